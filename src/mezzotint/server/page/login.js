// The login form, where the server was started with a token. The token becomes a cookie that scripts cannot read.

import { onLogin, post } from "./api.js";
import { el, openDialog } from "./dom.js";

let waiting = null;

function ask() {
  waiting ??= new Promise((resolve) => {
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
        resolve();
      } catch (error) {
        wrong.textContent = error.status === 401 ? "This is not the token." : error.message;
        wrong.hidden = false;
        input.select();
      }
    });
    let done = false;
    const dialog = openDialog("Log in", content, { onclose: () => ((waiting = null), done || ask()) });
  });
  return waiting;
}

/** Answer a missing token with the form. */
export function build() {
  onLogin(ask);
}
