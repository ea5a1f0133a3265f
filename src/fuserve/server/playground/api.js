// The server's API: its models, and answers that arrive piece by piece.

/** What the API answered instead of a result. */
export class ApiError extends Error {
  /** @param {string} message @param {number} status 0 where no answer came */
  constructor(message, status = 0, details = []) {
    super(message);
    this.status = status;
    this.details = details;
  }
}

const PAINTS = "text-to-image";

/**
 * The names of the first model that answers, and of the first that paints.
 * @returns {Promise<{text: string, image: string}>} "" where there is none
 */
export async function firstModels(apiKey) {
  const response = await request("v1/models", { headers: authorization(apiKey) });
  const { data } = await response.json();
  if (!data?.length) throw new ApiError("The server lists no model.");
  return {
    text: data.find((model) => model.task !== PAINTS)?.id ?? "",
    image: data.find((model) => model.task === PAINTS)?.id ?? "",
  };
}

/**
 * Stream the answer to a chat.
 * @yields {{text: string, finishReason: ?string, usage: ?object}}
 */
export async function* streamChat(body, apiKey, signal) {
  const asked = { ...body, stream_options: { include_usage: true } };
  for await (const event of stream("v1/chat/completions", asked, apiKey, signal)) {
    const choice = event.choices?.[0];
    yield {
      text: choice?.delta?.content ?? "",
      finishReason: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
}

/**
 * Stream the previews of a picture and the picture itself.
 * @yields {{type: string, b64_json: string, step: number, steps: number, seed: number}}
 */
export const streamImage = (body, apiKey, signal) =>
  stream("v1/images/generations", body, apiKey, signal);

/** The events of a request, until the server says that they are all. */
async function* stream(path, body, apiKey, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...authorization(apiKey) },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message ?? String(event.error));
    yield event;
  }
  throw new ApiError("The connection ended before the answer did.");
}

const authorization = (apiKey) => (apiKey ? { authorization: `Bearer ${apiKey}` } : {});

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await apiError(response);
  return response;
}

/** An error in OpenAI's shape, or whatever else came. */
async function apiError(response) {
  const { error } = await response.json().catch(() => ({}));
  const details = [`status ${response.status}`];
  const retryAfter = response.headers.get("retry-after");
  if (retryAfter) details.push(`try again in ${retryAfter} s`);
  const requestId = response.headers.get("x-request-id");
  if (requestId) details.push(`request ${requestId}`);
  return new ApiError(
    error?.message ?? (response.statusText || "The server refused."), response.status, details);
}

/** The data of each server-sent event. */
async function* events(stream) {
  let rest = "";
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
