// The bundled models in the page. `lastRun` keeps what went in and came out, for whoever wants to check it.
const S = 96, TILE = 32, SHARED = new URL('../_static/', location.href), PLANE = S * S
const $ = id => document.getElementById(id)
const say = text => { $('message').textContent = text }
const loaded = new Set()
let worker, clean, busy = false, again = false, lastRun

const random = seed => () => {                                  // mulberry32: the same noise each time
  seed = seed + 0x6D2B79F5 | 0
  let t = Math.imul(seed ^ seed >>> 15, 1 | seed)
  t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t
  return ((t ^ t >>> 14) >>> 0) / 2 ** 32
}
const noise = (() => {
  const next = random(1)
  return Float32Array.from({ length: 3 * PLANE }, () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next()))
})()
const clamp = v => Math.min(1, Math.max(0, v))
const psnr = image => -10 * Math.log10(image.reduce((sum, v, i) => sum + (clamp(v) - clean[i]) ** 2, 0) / image.length)

function panel(parent, name, side) {                            // a canvas with a caption, made once
  let figure = parent.querySelector(`[data-name="${name}"]`)
  if (!figure) {
    figure = document.createElement('figure')
    figure.dataset.name = name
    figure.innerHTML = `<canvas width="${side}" height="${side}" role="img"></canvas><figcaption></figcaption>`
    parent.append(figure)
  }
  return figure
}
function draw(parent, name, side, caption, pixel) {             // pixel(i) -> [r, g, b] in 0..1
  const figure = panel(parent, name, side), canvas = figure.querySelector('canvas'), context = canvas.getContext('2d')
  const data = context.createImageData(side, side)
  data.data.fill(255)
  for (let i = 0; i < side * side; i++) pixel(i).forEach((v, c) => { data.data[4 * i + c] = 255 * clamp(v) })
  context.putImageData(data, 0, 0)
  canvas.setAttribute('aria-label', figure.querySelector('figcaption').textContent = caption)
}
const colours = image => i => [image[i], image[i + PLANE], image[i + 2 * PLANE]]

function tiles(image, back) {                                   // [3, S, S] -> [9, 3, 32, 32], or back again
  const out = new Float32Array(image.length), n = S / TILE
  let at = 0
  for (let t = 0; t < n * n; t++) for (let c = 0; c < 3; c++) for (let y = 0; y < TILE; y++) for (let x = 0; x < TILE; x++, at++) {
    const from = c * PLANE + ((t / n | 0) * TILE + y) * S + t % n * TILE + x
    if (back) out[from] = image[at]; else out[at] = image[from]
  }
  return out
}

const ask = question => new Promise((answer, fail) => {          // one question at a time to the thread of the models
  if (typeof WebAssembly === 'undefined') throw new Error('This browser has no WebAssembly, which the models need: noise can be looked at, but not removed.')
  if (location.protocol === 'file:') throw new Error('A browser does not load a model from a file: serve this folder (python -m http.server) and open the page from there.')
  worker ??= new Worker(new URL('worker.js', SHARED))
  const stop = told => { worker.terminate(); worker = undefined; fail(new Error(told)) }               // the next question begins anew
  worker.onmessage = ({ data }) => data.told ? stop(data.told) : answer(data)
  worker.onerror = () => stop('The script that runs the models could not be loaded.')
  worker.postMessage(question)
})

async function denoise(name, noisy, sigma) {
  const paper = name === 'paper'
  const feed = paper ? { x: [tiles(noisy), [9, 3, TILE, TILE]] } : { x: [noisy, [1, 3, S, S]], sigma: [Float32Array.of(sigma), [1]] }
  const out = await ask({ name, feed })
  return { ...out, image: paper ? tiles(out.image.data, true) : out.image.data }
}

function maps({ data, dims: [blocks, , tokens, experts] }) {
  const row = Math.sqrt(tokens), n = S / TILE, side = row * n, sorted = data.slice().sort()
  const [low, high] = [.01, .99].map(share => sorted[Math.floor(share * (sorted.length - 1))])          // a few patches do not set the scale
  $('scale').textContent = `Dark: ${(100 * low).toFixed(0)} % or less, light: ${(100 * high).toFixed(0)} % or more of a patch's attention is that expert's.`
  for (let b = 0; b < blocks; b++) for (let e = 0; e < experts; e++) {
    const at = i => {
      const y = i / side | 0, x = i % side, tile = (y / row | 0) * n + (x / row | 0)
      return data[((b * n * n + tile) * tokens + y % row * row + x % row) * experts + e]
    }
    let sum = 0
    for (let i = 0; i < side * side; i++) sum += at(i)
    const shade = i => { const p = clamp((at(i) - low) / (high - low || 1)); return [.1 + .9 * p, .1 + .85 * p ** .8, .25 + .45 * p] }
    draw($('maps'), `${b}${e}`, side, `block ${b}, ${['cheap', 'medium', 'expensive'][e]} expert: ${(100 * sum / side / side).toFixed(0)} % on average`, shade)
  }
}

async function update() {
  if (!clean) return
  if (busy) { again = true; return }
  busy = true
  const sigma = +$('sigma').value, model = $('model').value, own = $('noisy').checked
  document.querySelector('output').textContent = sigma.toFixed(2)
  const noisy = own ? clean : clean.map((v, i) => clamp(v + sigma * noise[i]))
  const told = image => own || !sigma ? '' : `: ${psnr(image).toFixed(1)} dB`
  draw($('pictures'), 'picture', S, 'the picture', colours(clean))
  draw($('pictures'), 'noisy', S, 'noisy' + told(noisy), colours(noisy))
  try {
    if (!loaded.has(model)) say('The model is being loaded ...')
    const { image, routing, ms, threads } = await denoise(model, noisy, sigma)
    loaded.add(model)
    draw($('pictures'), 'denoised', S, 'denoised' + told(image), colours(image))
    draw($('pictures'), 'difference', S, 'what was taken away (× 2)', i => colours(noisy)(i).map((v, c) => .5 + 2 * (v - clamp(image[i + c * PLANE]))))
    $('routing').hidden = !routing
    if (routing) maps(routing)
    say(note + `${model}: ${Math.round(ms)} ms in this browser.`)
    lastRun = { model, sigma, ms, threads, noisy: Array.from(noisy), image: Array.from(image), routing: routing && Array.from(routing.data) }
    $('save').disabled = false
  } catch (error) { say(error.message) }
  busy = false
  if (again) { again = false; update() }
}

let note = ''
async function take(blob, name) {                               // a picture, or a sentence that says why not
  note = ''
  say('')
  try {
    if (blob.size > 60e6) throw new Error(`${name} has ${Math.round(blob.size / 1e6)} MB: take one of at most 60.`)
    const bitmap = await createImageBitmap(blob).catch(() => { throw new Error(`${name} is no picture that this browser can read: take a PNG or JPEG file.`) })
    const { width, height } = bitmap, side = Math.min(width, height)
    if (width * height > 60e6) { bitmap.close(); throw new Error(`${name} has ${width} × ${height} pixels: take one of at most 60 million.`) }
    const canvas = Object.assign(document.createElement('canvas'), { width: S, height: S }), context = canvas.getContext('2d', { willReadFrequently: true })
    context.imageSmoothingQuality = 'high'
    const paint = () => context.drawImage(bitmap, (width - side) / 2, (height - side) / 2, side, side, 0, 0, S, S)
    paint()
    if (context.getImageData(0, 0, S, S).data.some((v, i) => i % 4 === 3 && v < 255)) {
      note = 'What is transparent was laid on white. '
      Object.assign(context, { fillStyle: '#fff', globalCompositeOperation: 'destination-over' }).fillRect(0, 0, S, S)
    }
    const { data } = context.getImageData(0, 0, S, S)
    clean = Float32Array.from({ length: 3 * PLANE }, (_, i) => data[4 * (i % PLANE) + (i / PLANE | 0)] / 255)
    await update()
  } catch (error) { say(error.message) }
}
const own = file => { if (file) { $('picture').value = ''; take(file, file.name) } }
const listed = async () => {
  const name = $('picture').value
  if (!name) return $('file').click()
  try { take(await (await fetch(new URL(`pictures/${name}.png`, SHARED))).blob(), name) }
  catch { say('A browser does not load pictures of a page opened from a file: drop one here, or serve this folder (python -m http.server).') }
}

for (const id of ['sigma', 'model', 'noisy']) $(id).addEventListener('input', update)
$('file').addEventListener('change', () => own($('file').files[0]))
$('picture').addEventListener('change', listed)
$('save').addEventListener('click', () => panel($('pictures'), 'denoised', S).querySelector('canvas').toBlob(blob =>
  Object.assign(document.createElement('a'), { href: URL.createObjectURL(blob), download: 'denoised.png' }).click()))
for (const kind of ['dragover', 'dragleave', 'drop']) $('drop').addEventListener(kind, event => {
  event.preventDefault()
  $('drop').classList.toggle('over', kind === 'dragover')
  if (kind === 'drop') own(event.dataTransfer.files[0])
})
say('')
listed()
