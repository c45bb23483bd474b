// The login form, where the server was started with a token. The token becomes a cookie that scripts cannot read.

import { onLogin, post } from "./api.js";
import { el, openDialog } from "./dom.js";

let waiting = null; // resolves after the login, for all calls that wait for it

function ask() {
  waiting ??= new Promise((resolve) => open(() => {
    waiting = null;
    resolve();
  }));
  return waiting;
}

/** Open the form; it comes again until the token was right. */
function open(onDone) {
  let done = false;
  const input = el("input", { type: "password", id: "token", autocomplete: "current-password", required: true });
  const wrong = el("p", { class: "warning", role: "alert", hidden: true });
  const content = el("form", { class: "login" }, el("p", { text: "This server wants its token: the text in the file that it was started with." }),
    el("label", { for: "token", text: "Token" }), input, wrong, el("button", { type: "submit", class: "primary", text: "Log in" }));
  content.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await post("/api/login", { token: input.value });
      done = true;
      dialog.close();
    } catch (error) {
      wrong.textContent = error.status === 401 ? "This is not the token." : error.message;
      wrong.hidden = false;
      input.select();
    }
  });
  const dialog = openDialog("Log in", content, { onclose: () => (done ? onDone() : open(onDone)) });
}

/** Answer a missing token with the form. */
export function build() {
  onLogin(ask);
}
