// What AIME's JavaScript client does in a page, written from its behaviour: log in or use a key,
// POST the parameters (objects as JSON texts), then GET the progress until it is done. It reads the
// body of a poll whatever its status, and gives up when it says `success: false`.
//
// node aime_client.mjs SERVER ENDPOINT KEY MODE PROMPT; MODE is `poll`, `wait` or `login`.
// Prints one JSON object: the calls that a page's callbacks would get.

const [server, endpoint, key, mode, prompt] = process.argv.slice(2);
const calls = { progress: [], result: null, error: null };

async function fetchJson(path, params) {
  const options = params
    ? {
        method: "POST",
        headers: { "Content-type": "application/json; charset=UTF-8" },
        body: JSON.stringify(params),
      }
    : {};
  const response = await fetch(server + path, options);
  const body = await response.json();
  if (params && !response.ok) throw new Error(JSON.stringify(body));
  return body;
}

function withTexts(params) {
  const texts = {};
  for (const [name, value] of Object.entries(params)) {
    texts[name] = value !== null && typeof value === "object" ? JSON.stringify(value) : value;
  }
  return texts;
}

async function poll(jobId, keys) {
  const query = Object.entries({ ...keys, job_id: jobId })
    .map(([name, value]) => `${name}=${encodeURIComponent(value)}`)
    .join("&");
  for (;;) {
    const answer = await fetchJson(`/${endpoint}/progress?${query}`);
    if (!answer.success) {
      calls.error = answer;
      return;
    }
    if (answer.job_state === "done") {
      calls.result = answer.job_result;
      return;
    }
    const { progress, queue_position, estimate, num_workers_online, progress_data } =
      answer.progress;
    calls.progress.push({
      progress,
      queue_position,
      estimate,
      num_workers_online,
      text: progress_data.text,
    });
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

// A key that a page has not got reaches the server as the text "undefined" in a query.
const keys = { key: key || undefined };
try {
  if (mode === "login") {
    const answer = await fetchJson(
      `/${endpoint}/login?user=undefined&key=${key}&version=${encodeURIComponent("JavaScript 0.8.5")}`,
    );
    if (!answer.success) throw new Error(JSON.stringify(answer));
    keys.client_session_auth_key = answer.client_session_auth_key;
    keys.key = undefined;
  }
  const response = await fetchJson(
    `/${endpoint}`,
    withTexts({
      prompt_input: prompt,
      chat_context: [{ role: "system", content: "Be short." }],
      top_k: 40,
      top_p: 0.9,
      temperature: 0.8,
      max_gen_tokens: 100,
      ...keys,
      wait_for_result: mode === "wait",
    }),
  );
  if (mode === "wait" || !response.success) {
    calls.result = response;
  } else {
    calls.progress.push({ progress: 0, queue_position: -1, estimate: -1, num_workers_online: -1 });
    await poll(response.job_id, keys);
  }
} catch (error) {
  calls.error = String(error);
}
console.log(JSON.stringify(calls));
