// The models, in a thread of their own: the page stays free while they compute. One question at a time, one answer each.
importScripts('vendor/ort.wasm.min.js')
ort.env.wasm.wasmPaths = new URL('vendor/', location).href
ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1   // threads share memory, which few servers allow
const sessions = {}

onmessage = async ({ data: { name, feed } }) => {                // feed: {input: [numbers, shape]}
  try {
    const run = sessions[name] ??= await ort.InferenceSession.create(new URL(`models/${name}.onnx`, location).href)
    const began = performance.now()
    const out = await run.run(Object.fromEntries(Object.entries(feed).map(([key, [data, dims]]) => [key, new ort.Tensor('float32', data, dims)])))
    const answer = Object.fromEntries(Object.entries(out).map(([key, { data, dims }]) => [key, { data, dims }]))
    postMessage({ ...answer, ms: performance.now() - began, threads: ort.env.wasm.numThreads })
  } catch (error) { postMessage({ told: `The model ${name} could not be run in this browser: ${error.message ?? error}` }) }
}
