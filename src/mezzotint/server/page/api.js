// Calls of /api. An error is thrown with the server's sentence; a missing token opens the login form.

export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code;
    this.param = error?.param;
  }
}

let askForToken = () => Promise.reject(new ApiError(401));

/** Set what is done when the server wants a token: a function that resolves after a login. */
export function onLogin(ask) {
  askForToken = ask;
}

/** Parse JSON; a seed above 2^53, which a number of JavaScript cannot hold, becomes a string. */
export function parse(text) {
  return JSON.parse(text.replace(/("(?:variation_)?seed":\s*)(\d{16,})/g, '$1"$2"'));
}

/** Return JSON in which such seeds are numbers again. */
export function stringify(value) {
  return JSON.stringify(value).replace(/("(?:variation_)?seed":)"(\d{1,20})"/g, "$1$2");
}

async function call(method, path, body, options = {}) {
  const init = { method, headers: {}, credentials: "same-origin", signal: options.signal };
  if (body instanceof Blob) {
    init.body = body;
    init.headers["Content-Type"] = body.type || "application/octet-stream";
  } else if (body !== undefined) {
    init.body = stringify(body);
    init.headers["Content-Type"] = "application/json";
  }
  let reply;
  try {
    reply = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server does not answer. Is it still running?" });
  }
  if (reply.status === 401 && path !== "/api/login") {
    await askForToken();
    return call(method, path, body, options);
  }
  const text = await reply.text();
  let data = null;
  try {
    data = text ? parse(text) : null;
  } catch {
    data = null;
  }
  if (!reply.ok) throw new ApiError(reply.status, data?.error);
  return data;
}

export const get = (path, options) => call("GET", path, undefined, options);
export const post = (path, body, options) => call("POST", path, body ?? {}, options);
export const patch = (path, body) => call("PATCH", path, body);
export const remove = (path) => call("DELETE", path);

export const fileUrl = (picture) => `/api/pictures/${picture.id}/file`;
export const thumbnailUrl = (picture) => `/api/pictures/${picture.id}/thumbnail`;
export const uploadUrl = (id) => `/api/uploads/${id}`;

/** Upload a picture and return {id, width, height}. */
export const upload = (blob) => call("POST", "/api/uploads", blob);

/** Return the file of a picture of the history. */
export async function download(picture) {
  const reply = await fetch(fileUrl(picture));
  if (!reply.ok) throw new ApiError(reply.status);
  return reply.blob();
}

/** Return the request that draws a picture of the history: its job's, with its own seed. */
export async function requestOf(picture) {
  const job = await get(`/api/jobs/${picture.job}`);
  return { request: { ...job.request, seed: picture.seed, count: 1 }, model: job.model, vae: job.vae };
}
