// llama.cpp's prefill and decode times of one GGUF file on the CPU, through node-llama-cpp.
//
//   node bench.mjs MODEL.gguf [--threads 2] [--context 256] [--steps 64] [--rounds 5]
//   node bench.mjs MODEL.gguf --serve [...]    a line "prefill" or "decode" on stdin makes one measurement
//
// Prints JSON: one object with all rounds, or with --serve one line for the start and one for each request.
// `ms` is what a caller waits for, wall time with JavaScript in it: of the prompt of `context` tokens (prefill),
// of one token at a cache of `context` tokens (decode, greedy). `inner_ms` is llama.cpp's own figure of the same.
import readline from "node:readline";
import {getLlama, GgmlType, LlamaLogLevel} from "node-llama-cpp";

const arguments_ = process.argv.slice(2);
const file = arguments_[0];
if (file === undefined || file.startsWith("--")) {
  console.error("usage: node bench.mjs MODEL.gguf [--serve] [--threads N] [--context N] [--steps N] [--rounds N]");
  process.exit(2);
}

/** The number after `--name`, or `otherwise`. */
function option(name, otherwise) {
  const at = arguments_.indexOf(`--${name}`);
  const value = at < 0 ? otherwise : Number(arguments_[at + 1]);
  if (!Number.isInteger(value) || value < 1) throw new Error(`--${name} takes a whole number from 1; got ${arguments_[at + 1]}`);
  return value;
}

const threads = option("threads", 2);
const length = option("context", 256);
const steps = option("steps", 64);
const rounds = option("rounds", 5);

let told = []; // llama.cpp's messages since the last reading
const llama = await getLlama({
  gpu: false,
  build: "never",
  maxThreads: threads,
  logLevel: LlamaLogLevel.info,
  logger: (_level, message) => told.push(message)
});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({
  contextSize: length + steps + 1, batchSize: length, threads, performanceTracking: true
});
const sequence = context.getSequence();

// Fixed tokens from the whole vocabulary: no time here depends on their values.
const vocabulary = model.fileInfo.metadata.tokenizer.ggml.tokens.length;
const prompt = Array.from({length}, (_, i) => 1000 + (i * 7919) % (vocabulary - 2000));

/** Milliseconds a token that llama.cpp itself counted since the last call: of "prompt eval" or of "eval". */
async function innerTime(kind) {
  told = [];
  await context.printTimings();
  const line = told.flatMap((message) => message.split("\n")).find((text) => kind.test(text)) ?? "";
  const found = /=\s*([\d.]+) ms \/\s*(\d+)/.exec(line);
  return found ? Number(found[1]) / Number(found[2]) : null;
}

async function prefill() {
  await sequence.clearHistory();
  await context.printTimings(); // resets the counters
  const start = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(prompt);
  const ms = performance.now() - start;
  const inner = await innerTime(/prompt eval time/);
  return {kind: "prefill", ms, inner_ms: inner === null ? null : inner * length, tokens: length};
}

async function decode() {
  await sequence.clearHistory();
  await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, -1));
  const tokens = sequence.evaluate(prompt.slice(-1), {temperature: 0, yieldEogToken: true, contextShift: {size: 1}});
  const text = [(await tokens.next()).value]; // evaluates the end of the prompt
  await context.printTimings();
  const start = performance.now();
  while (text.length <= steps) text.push((await tokens.next()).value);
  const ms = (performance.now() - start) / steps;
  const inner = await innerTime(/(?<!prompt )\beval time/);
  await tokens.return();
  return {kind: "decode", ms, inner_ms: inner, tokens: text.filter((token) => token !== undefined).length - 1};
}

const about = {
  kind: "start",
  library: "llama.cpp through node-llama-cpp",
  node: process.version,
  llama_cpp: llama.llamaCppRelease,
  system: llama.systemInfo,
  gpu: llama.gpu,
  file: file.split("/").pop(),
  types: tensorTypes(),
  threads: context.currentThreads || context.idealThreads,
  context: length,
  steps
};

/** How many weights of the file have which type. */
function tensorTypes() {
  const counts = {};
  for (const tensor of model.fileInfo.tensorInfo ?? []) {
    const size = tensor.dimensions.reduce((product, n) => product * Number(n), 1);
    const type = GgmlType[tensor.ggmlType] ?? String(tensor.ggmlType);
    counts[type] = (counts[type] ?? 0) + size;
  }
  return counts;
}

const measure = {prefill, decode};
for (const run of Object.values(measure)) await run(); // warm up
if (arguments_.includes("--serve")) {
  console.log(JSON.stringify(about));
  for await (const line of readline.createInterface({input: process.stdin})) {
    const run = measure[line.trim()];
    const answer = run ? await run() : {kind: "error", message: `no request ${JSON.stringify(line)}`};
    console.log(JSON.stringify(answer));
  }
} else {
  const taken = [];
  for (let i = 0; i < rounds; i++) for (const run of Object.values(measure)) taken.push(await run());
  console.log(JSON.stringify({...about, kind: "report", rounds: taken}, null, 2));
}
process.exit(0);
