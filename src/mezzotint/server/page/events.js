// One connection to /api/events a browser: the tab that holds a lock has it, and passes on what it hears. Browsers allow
// six connections to a server in all, so that one for each tab would soon block the page.

import { parse } from "./api.js";

const NAMES = ["queue", "job", "step", "preview", "picture"];
const LOCK = "mezzotint-events";

/** Listen to the server: `onevent(name, data)` for each event, `onstate(connected)` when the connection comes or goes. */
export function listen(onevent, onstate) {
  const channel = new BroadcastChannel("mezzotint-events");
  const last = new Map(); // what a tab that opens later has to hear at once

  const pass = (message) => {
    if (message.kind === "event") onevent(message.name, message.data);
    else if (message.kind === "state") onstate(message.connected);
  };
  const send = (message) => {
    channel.postMessage(message);
    pass(message);
  };

  function connect() {
    const source = new EventSource("/api/events");
    let connected = false;
    const tell = (now) => {
      connected = now;
      send({ kind: "state", connected });
    };
    source.onopen = () => tell(true);
    source.onerror = () => {
      if (connected || source.readyState === EventSource.CLOSED) tell(false);
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000); // it was refused, say while restarting
    };
    for (const name of NAMES) {
      source.addEventListener(name, (event) => {
        const message = { kind: "event", name, data: parse(event.data) };
        if (name === "preview" || name === "step") last.set(name, message);
        send(message);
      });
    }
    channel.onmessage = ({ data }) => {
      if (data.kind !== "hello") return;
      channel.postMessage({ kind: "state", connected });
      last.forEach((message) => channel.postMessage(message));
    };
  }

  channel.onmessage = ({ data }) => pass(data);
  channel.postMessage({ kind: "hello" });
  if (navigator.locks) navigator.locks.request(LOCK, () => (connect(), new Promise(() => {})));
  else connect(); // not a secure context: no locks there
}
