// The OpenAI client of Node, used as its documentation shows.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const task = JSON.parse(process.env.CLIENT_TASK);
const messages = [{ role: "user", content: "Name a river, then stop." }];

function clientWith(apiKey) {
  return new OpenAI({ baseURL: task.base_url, apiKey, maxRetries: 0 });
}

function noted(text, finish, usage, headers) {
  return {
    text,
    finish,
    usage: usage ?? null,
    cost: usage?.cost ?? null,
    receipt_id: usage?.receipt_id ?? null,
    header_receipt_id: headers.get("x-receipt-id"),
    header_request_id: headers.get("x-request-id"),
  };
}

async function complete(client, model) {
  const call = client.chat.completions.create({ model, messages });
  const { data, response } = await call.withResponse();
  const choice = data.choices[0];
  return noted(choice.message.content, choice.finish_reason, data.usage, response.headers);
}

async function stream(client, model, options) {
  const body = { model, messages, stream: true };
  if (options) body.stream_options = options;
  const { data, response } = await client.chat.completions.create(body).withResponse();
  let text = "";
  let finish = null;
  let usage = null;
  let chunks = 0;
  for await (const chunk of data) {
    chunks += 1;
    text += chunk.choices[0]?.delta?.content ?? "";
    finish = chunk.choices[0]?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  return { ...noted(text, finish, usage, response.headers), chunks };
}

async function models(client) {
  const ids = [];
  for await (const item of client.models.list()) ids.push(item.id);
  const listed = ids.includes(task.model) || ids.includes(task.model.split(":")[0]);
  return { count: ids.length, listed, ids: ids.slice(0, 5) };
}

async function failing(call) {
  try {
    return { error: null, answer: await call() };
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return {
      error: {
        class: error.constructor.name,
        status: error.status ?? null,
        code: error.code ?? null,
        type: error.type ?? null,
        message: error.message,
        request_id: error.requestID ?? null,
      },
    };
  }
}

const client = clientWith(task.api_key);
const cases = {
  complete: await complete(client, task.model),
  stream: await stream(client, task.model),
  stream_usage: await stream(client, task.model, { include_usage: true }),
  models: await models(client),
  bad_key: await failing(() => complete(clientWith(task.bad_key), task.model)),
  unknown_model: await failing(() => complete(client, task.unknown_model)),
  unknown_model_stream: await failing(() => stream(client, task.unknown_model)),
};
const installed = new URL("node_modules/openai/package.json", import.meta.url);
const { version } = JSON.parse(readFileSync(installed, "utf8"));
process.stdout.write(JSON.stringify({ client: "openai-node", version, cases }) + "\n");
