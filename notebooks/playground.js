// Both stages of minvqgan in plain JavaScript, function by function as in minvqgan/*.py. playground.html uses it.
//
// A map is {H, W, C, x}: H * W rows of C channels. Channels come last because a 1x1 convolution is then a linear layer,
// and attention's (N, C) is the map itself. Numbers are float32 in memory; a sum is float64 until it is stored.
"use strict";

let model, weights, codebook, cache = { filled: 0 };

/** What playground.py packed: the high bytes of all float16 numbers, then the low ones. */
function unpack(about, bytes) {
  const size = (shape) => shape.reduce((a, b) => a * b);
  const total = about.tensors.reduce((sum, [, shape]) => sum + size(shape), 0), numbers = new Float32Array(total);
  const float = Float32Array.from({ length: 65536 }, (_, bits) => {
    const exponent = (bits >> 10) & 31, mantissa = (bits & 1023) / 1024;
    return (bits >> 15 ? -1 : 1) * (exponent ? (1 + mantissa) * 2 ** (exponent - 15) : mantissa * 2 ** -14);
  });
  for (let i = 0; i < total; i++) numbers[i] = float[(bytes[i] << 8) | bytes[total + i]];
  let end = 0;
  weights = {};
  for (const [name, shape] of about.tensors)
    weights[name] = { O: shape[0], I: size(shape) / shape[0], x: numbers.subarray(end, (end += size(shape))) };
  [model, codebook] = [about, weights["vqgan.quantizer.codebook.weight"]];
  for (let k = 0; k < codebook.O && model.vqgan.l2_norm; k++) {
    const e = code(k), norm = Math.hypot(...e);
    e.forEach((a, i) => (e[i] = a / norm));
  }
}

/** e_k, a row of the codebook (K, D). */
const code = (k) => codebook.x.subarray(k * codebook.I, (k + 1) * codebook.I);

// layers.py

/** x (rows, I) W^T, W (O, I) -> (rows, O). In blocks of 2 x 4 sums: a number is read once for 2 or 4 of them. */
function product(x, rows, { O, I, x: w }) {
  const out = new Float32Array(rows * O);
  for (let r = 0; r < rows; r += 2)
    for (let o = 0; o < O; o += 4) { // at the edge a row or column is computed twice
      const r1 = Math.min(r + 1, rows - 1), o1 = Math.min(o + 1, O - 1);
      const o2 = Math.min(o + 2, O - 1), o3 = Math.min(o + 3, O - 1);
      const a = r * I, b = r1 * I, c = o * I, d = o1 * I, e = o2 * I, f = o3 * I, y = r * O, z = r1 * O;
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
      for (let i = 0; i < I; i++) {
        const s = x[a + i], t = x[b + i], w0 = w[c + i], w1 = w[d + i], w2 = w[e + i], w3 = w[f + i];
        s0 += s * w0; s1 += s * w1; s2 += s * w2; s3 += s * w3;
        t0 += t * w0; t1 += t * w1; t2 += t * w2; t3 += t * w3;
      }
      out[y + o] = s0; out[y + o1] = s1; out[y + o2] = s2; out[y + o3] = s3;
      out[z + o] = t0; out[z + o1] = t1; out[z + o2] = t2; out[z + o3] = t3;
    }
  return out;
}

/** x (rows, I) -> (rows, O). */
function linear(name, x, rows) {
  const out = product(x, rows, weights[name + ".weight"]), bias = weights[name + ".bias"]?.x, O = out.length / rows;
  if (bias) for (let r = 0; r < out.length; r += O) for (let o = 0; o < O; o++) out[r + o] += bias[o];
  return out;
}

function conv1x1(name, { H, W, x }) {
  return { H, W, C: weights[name + ".weight"].O, x: linear(name, x, H * W) };
}

/** Zeros around a map: `before` at the top and left, one at the bottom and right. */
function pad({ H, W, C, x }, before) {
  const out = { H: H + before + 1, W: W + before + 1, C };
  out.x = new Float32Array(out.H * out.W * C);
  for (let y = 0; y < H; y++) out.x.set(x.subarray(y * W * C, (y + 1) * W * C), ((y + before) * out.W + before) * C);
  return out;
}

/** A 3x3 convolution is a linear layer on patches of 3x3 pixels: weights (O, ky, kx, C). */
function conv3x3(name, map, stride = 1) {
  if (stride === 1 && map.H % 2 === 0 && map.W % 2 === 0) return winograd(name, map);
  const h = map.H / stride, w = map.W / stride, { W, C, x } = pad(map, 2 - stride), O = weights[name + ".weight"].O;
  const out = { H: h, W: w, C: O, x: new Float32Array(h * w * O) }, patches = new Float32Array(w * 9 * C);
  for (let i = 0; i < h; i++) {
    for (let j = 0, at = 0; j < w; j++)
      for (let ky = 0; ky < 3; ky++)
        for (let k = ((i * stride + ky) * W + j * stride) * C, end = k + 3 * C; k < end; k++) patches[at++] = x[k];
    out.x.set(linear(name, patches, w), i * w * O);
  }
  return out;
}

// B^T d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
const BT = [[0, 2, -1], [1, 2, 1], [2, 1, -1], [1, 3, -1]];

/** The same, twice as fast: Winograd's F(2x2, 3x3) (Lavin & Gray 2015, arXiv:1509.09308). Tiles of 2x2 outputs come from
    4x4 inputs d and the kernel g, y = A^T [(G g G^T) * (B^T d B)] A, with 16 products instead of 36. */
function winograd(name, { H, W, C, x }) {
  const weight = weights[name + ".weight"], O = weight.O, bias = weights[name + ".bias"].x, tiles = W / 2;
  const out = { H, W, C: O, x: new Float32Array(H * W * O) }, d = pad({ H, W, C, x }, 1).x, L = (W + 2) * C;
  const U = (weight.U ??= winogradKernels(weight, C));
  const rows = BT.map(() => new Float32Array(L)), V = new Float32Array(tiles * C);
  for (let top = 0; top < H; top += 2) { // a row of tiles
    for (const [k, [a, b, sign]] of BT.entries()) // B^T d
      for (let i = 0; i < L; i++) rows[k][i] = d[(top + a) * L + i] + sign * d[(top + b) * L + i];
    const M = U.map((u, k) => { // (B^T d) B, and the product: for each of the 16 numbers of a tile a linear layer
      const row = rows[k >> 2], [a, b, sign] = BT[k & 3];
      for (let tile = 0, v = 0; tile < tiles; tile++)
        for (let c = 2 * tile * C, end = c + C; c < end; c++) V[v++] = row[c + a * C] + sign * row[c + b * C];
      return product(V, tiles, u);
    });
    for (let k = 0; k < 4; k++) // A^T M: m0 + m1 + m2 and m1 - m2 - m3
      for (let v = 0; v < tiles * O; v++) {
        const m1 = M[4 + k][v], m2 = M[8 + k][v];
        M[k][v] += m1 + m2;
        M[4 + k][v] = m1 - m2 - M[12 + k][v];
      }
    for (let y = 0; y < 2; y++) { // (A^T M) A
      const [m0, m1, m2, m3] = M.slice(4 * y);
      for (let tile = 0, v = 0, at = (top + y) * W * O; tile < tiles; tile++, at += O)
        for (let o = 0; o < O; o++, v++, at++) {
          out.x[at] = m0[v] + m1[v] + m2[v] + bias[o];
          out.x[at + O] = m1[v] - m2[v] - m3[v] + bias[o];
        }
    }
  }
  return out;
}

/** G g G^T for all kernels of a layer: 16 matrices (O, C). */
function winogradKernels({ O, I, x }, C) {
  const U = Array.from({ length: 16 }, () => ({ O, I: C, x: new Float32Array(O * C) }));
  const G = ([a, b, c]) => [a, (a + b + c) / 2, (a - b + c) / 2, c];
  for (let o = 0; o < O; o++)
    for (let c = 0; c < C; c++) {
      const g = [0, 1, 2].map((ky) => G([0, 1, 2].map((kx) => x[o * I + (3 * ky + kx) * C + c]))); // g G^T
      for (let j = 0; j < 4; j++) G(g.map((row) => row[j])).forEach((u, i) => (U[4 * i + j].x[o * C + c] = u));
    }
  return U;
}

function groupNorm(name, { H, W, C, x }) {
  const groups = model.vqgan.norm_groups, size = C / groups, N = H * W * size, out = new Float32Array(x.length);
  const weight = weights[name + ".weight"].x, bias = weights[name + ".bias"].x;
  for (let first = 0; first < C; first += size) {
    let sum = 0, squares = 0;
    for (let i = first; i < x.length; i += C)
      for (let j = i; j < i + size; j++) (sum += x[j]), (squares += x[j] * x[j]);
    const mean = sum / N, std = Math.sqrt(squares / N - mean * mean + 1e-6);
    for (let c = first; c < first + size; c++) {
      const scale = weight[c] / std, shift = bias[c] - mean * scale;
      for (let i = c; i < x.length; i += C) out[i] = x[i] * scale + shift;
    }
  }
  return { H, W, C, x: out };
}

function silu(map) {
  for (let i = 0; i < map.x.length; i++) map.x[i] /= 1 + Math.exp(-map.x[i]);
  return map;
}

/** x + y, into y. */
function add(x, y) {
  for (let i = 0; i < y.x.length; i++) y.x[i] += x.x[i];
  return y;
}

function resBlock(name, x) {
  let h = conv3x3(name + ".conv1", silu(groupNorm(name + ".norm1", x)));
  h = conv3x3(name + ".conv2", silu(groupNorm(name + ".norm2", h)));
  return add(weights[name + ".skip.weight"] ? conv1x1(name + ".skip", x) : x, h);
}

/** softmax(q k^T / sqrt(d)) v (Eq. 1): q (t, d), k and v (T, d) -> (t, d). causal: row i sees all up to T - t + i. */
function attention(q, k, v, d, causal = false) {
  const t = q.length / d, T = k.length / d, out = new Float32Array(q.length);
  for (let i = 0; i < t; i++) {
    const p = new Float32Array(causal ? T - t + i + 1 : T);
    for (let j = 0; j < p.length; j++) {
      let sum = 0;
      for (let c = 0; c < d; c++) sum += q[i * d + c] * k[j * d + c];
      p[j] = sum / Math.sqrt(d);
    }
    softmax(p);
    for (let j = 0; j < p.length; j++) for (let c = 0; c < d; c++) out[i * d + c] += p[j] * v[j * d + c];
  }
  return out;
}

function softmax(x) {
  const most = x.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - most);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
  return x;
}

function selfAttention2d(name, x) {
  const h = groupNorm(name + ".norm", x), [q, k, v] = ["q", "k", "v"].map((layer) => conv1x1(`${name}.${layer}`, h).x);
  return add(x, conv1x1(name + ".proj", { ...x, x: attention(q, k, v, x.C) }));
}

const downsample = (name, x) => conv3x3(name + ".conv", x, 2);

function upsample(name, { H, W, C, x }) {
  const out = { H: 2 * H, W: 2 * W, C, x: new Float32Array(4 * x.length) };
  for (let i = 0; i < 4 * H * W; i++) {
    const from = ((i / (4 * W)) | 0) * W + ((i % (2 * W)) >> 1);
    out.x.set(x.subarray(from * C, (from + 1) * C), i * C);
  }
  return conv3x3(name + ".conv", out);
}

// encoder.py, decoder.py, quantizer.py, vqgan.py

/** Layers in a row, numbered as in nn.Sequential. */
const sequential = (name, layers, x) => layers.reduce((h, layer, i) => layer(`${name}.layers.${i}`, h), x);

/** A level: `count` residual blocks, each with attention where the config says so. */
function blocks(count, level) {
  const { attn_resolutions, image_size } = model.vqgan;
  const block = attn_resolutions.includes(image_size >> level) ? [resBlock, selfAttention2d] : [resBlock];
  return Array(count).fill(block).flat();
}

/** x (H, W, 3) -> z (h, w, z_channels). */
function encoder(x) {
  const { ch_mult, num_res_blocks } = model.vqgan, layers = [conv3x3];
  for (let level = 0; level < ch_mult.length; level++)
    layers.push(...(level ? [downsample] : []), ...blocks(num_res_blocks, level));
  layers.push(resBlock, selfAttention2d, resBlock, groupNorm, (_, h) => silu(h), conv3x3);
  return sequential("vqgan.encoder", layers, x);
}

/** z_q (h, w, z_channels) -> x_hat (H, W, 3). */
function decoder(z) {
  const { ch_mult, num_res_blocks } = model.vqgan, layers = [conv3x3, resBlock, selfAttention2d, resBlock];
  for (let level = ch_mult.length - 1; level >= 0; level--)
    layers.push(...blocks(num_res_blocks + 1, level), ...(level ? [upsample] : [groupNorm]));
  return conv3x3("vqgan.decoder.conv_out", silu(sequential("vqgan.decoder", layers, z)));
}

/** Eq. 2: for each row of z the k with the smallest |z - e_k|^2, which is that with the largest z.e_k - |e_k|^2 / 2. */
function nearestCode(z, rows) {
  const scores = product(z, rows, codebook), K = codebook.O;
  const half = Array.from({ length: K }, (_, k) => code(k).reduce((sum, a) => sum + (a * a) / 2, 0));
  return Array.from({ length: rows }, (_, i) => {
    const score = scores.subarray(i * K, (i + 1) * K).map((s, k) => s - half[k]);
    return score.indexOf(Math.max(...score));
  });
}

/** Pixels (H, W, 3) in [-1, 1] -> h * w codes. */
function encodeIndices(x) {
  const z = conv1x1("vqgan.to_code", encoder(x));
  return nearestCode(z.x, z.H * z.W);
}

/** n * n codes -> pixels (H, W, 3), near [-1, 1]. */
function decodeIndices(indices) {
  const z_q = { H: model.n, W: model.n, C: codebook.I, x: new Float32Array(indices.length * codebook.I) };
  indices.forEach((k, i) => z_q.x.set(code(k), i * codebook.I));
  return decoder(conv1x1("vqgan.from_code", z_q));
}

// gpt.py

function layerNorm(name, x, C = model.gpt.n_embd) {
  const out = new Float32Array(x.length), weight = weights[name + ".weight"].x, bias = weights[name + ".bias"].x;
  for (let at = 0; at < x.length; at += C) {
    const row = x.subarray(at, at + C), mean = row.reduce((sum, a) => sum + a, 0) / C;
    const std = Math.sqrt(row.reduce((sum, a) => sum + (a - mean) ** 2, 0) / C + 1e-5);
    row.forEach((a, c) => (out[at + c] = ((a - mean) / std) * weight[c] + bias[c]));
  }
  return out;
}

/** x (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz & Stegun 7.1.26, which is off by at most 1.5e-7. */
function gelu(x) {
  const z = Math.abs(x) * Math.SQRT1_2, t = 1 / (1 + 0.3275911 * z);
  const series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)));
  const tail = series * t * Math.exp(-z * z); // 1 - erf(z)
  return (x * (x < 0 ? tail : 2 - tail)) / 2;
}

/** t new tokens of B sequences, (B * t, C) -> (B * t, C). The cache holds keys and values of those before. */
function causalSelfAttention(name, x, B, cache) {
  const { n_embd: C, n_head, block_size } = model.gpt, d = C / n_head, t = x.length / C / B, first = cache.filled;
  const qkv = linear(name + ".qkv", x, B * t), y = new Float32Array(x.length);
  for (let b = 0; b < B; b++)
    for (let head = 0; head < n_head; head++) {
      const [k, v] = (cache[`${name} ${b} ${head}`] ??= [0, 1].map(() => new Float32Array(block_size * d)));
      const q = new Float32Array(t * d), part = (at) => qkv.subarray(at + head * d, at + head * d + d);
      for (let i = 0; i < t; i++)
        [q, k, v].forEach((to, j) => to.set(part(((b * t + i) * 3 + j) * C), (j ? first + i : i) * d));
      const out = attention(q, k.subarray(0, (first + t) * d), v.subarray(0, (first + t) * d), d, true);
      for (let i = 0; i < t; i++) y.set(out.subarray(i * d, (i + 1) * d), (b * t + i) * C + head * d);
    }
  return linear(name + ".proj", y, B * t);
}

function block(name, x, B, cache) {
  const rows = x.length / model.gpt.n_embd, sum = (y) => y.map((a, i) => a + x[i]);
  x = sum(causalSelfAttention(name + ".attention", layerNorm(name + ".norm1", x), B, cache));
  return sum(linear(name + ".mlp.2", linear(name + ".mlp.0", layerNorm(name + ".norm2", x), rows).map(gelu), rows));
}

/** B sequences of tokens, of which the cache knows the first `filled` -> the logits after their last, (B, K). */
function gpt(sequences, cache) {
  const B = sequences.length, { n_embd: C, n_layer } = model.gpt, t = sequences[0].length - cache.filled;
  const token = weights["gpt.token_embedding.weight"].x, position = weights["gpt.position_embedding"].x;
  let x = Float32Array.from({ length: B * t * C }, (_, at) => {
    const row = Math.floor(at / C), i = cache.filled + (row % t), c = at % C;
    return token[sequences[Math.floor(row / t)][i] * C + c] + position[i * C + c];
  });
  for (let layer = 0; layer < n_layer; layer++) x = block(`gpt.blocks.${layer}`, x, B, cache);
  cache.filled += t;
  const last = sequences.flatMap((_, b) => [...x.subarray(((b + 1) * t - 1) * C, (b + 1) * t * C)]);
  return linear("gpt.head", layerNorm("gpt.norm", Float32Array.from(last)), B);
}

// sampler.py

/** The codes that may be chosen, the likeliest first. Of equal logits the first ones stay: sort keeps their order. */
function filterLogits(logits, topK, topP) {
  const likeliest = [...logits.keys()].sort((a, b) => logits[b] - logits[a]).slice(0, topK ?? logits.length);
  if (!(topP < 1)) return likeliest;
  let sum = 0;
  const p = softmax(Float32Array.from(likeliest, (k) => logits[k]));
  return likeliest.filter((_, i) => (sum += p[i]) - p[i] < topP || i === 0); // while all likelier codes do not reach it
}

/** logits (K), u in [0, 1) -> the code at which the cumulative distribution passes u, and the distribution p (K). */
function choose(logits, u, { temperature, topK, topP }) {
  const most = Math.max(...logits), p = new Float32Array(logits.length);
  if (temperature < 1e-30) p[logits.indexOf(most)] = 1;
  else {
    const scaled = logits.map((a) => Math.fround(a - most) / temperature), kept = filterLogits(scaled, topK, topP);
    softmax(Float32Array.from(kept, (k) => scaled[k])).forEach((a, i) => (p[kept[i]] = a));
  }
  let sum = 0;
  const cumulative = p.map((a) => (sum += a)), total = cumulative[p.length - 1];
  return { code: cumulative.findIndex((c, k) => p[k] > 0 && c > Math.fround(u * total)), p };
}

/** The uniform numbers of image `number` of a run, as torch.rand draws them from crc32(f"{seed} {number}"): MT19937. */
function uniforms(seed, number, count) {
  let crc = -1;
  for (const char of `${seed} ${number}`) {
    crc ^= char.charCodeAt(0);
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  const state = new Uint32Array(624).fill(~crc);
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  return Float32Array.from({ length: count }, (_, n) => {
    const i = n % 624, y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
    let x = (state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0));
    x ^= x >>> 11;
    x ^= (x << 7) & 0x9d2c5680;
    x ^= (x << 15) & 0xefc60000;
    return ((x ^ (x >>> 18)) & 0xffffff) / 2 ** 24;
  });
}

/** One step of continue_tokens: codes s so far, condition token r -> the next code. The cache stays for what agrees. */
function nextToken(r, s, u, sampling) {
  const guided = sampling.guidance !== 1, rows = guided ? [r, model.null] : [r], tokens = [...rows, ...s].join();
  if (!`${tokens},`.startsWith(`${cache.tokens},`)) cache = { filled: 0 };
  cache.filled = Math.min(cache.filled, s.length);
  cache.tokens = tokens;
  let logits = gpt(rows.map((token) => [token, ...s]), cache);
  const K = model.gpt.num_codes, without = logits.subarray(K);
  if (guided) logits = logits.subarray(0, K).map((a, k) => without[k] + sampling.guidance * (a - without[k]));
  return choose(logits, u, sampling);
}

// What the page asks for, of a worker or, where there is none, of itself.

const answers = {
  load: unpack,
  encode(rgba) {
    const side = model.vqgan.image_size, x = new Float32Array(3 * side * side);
    return encodeIndices({ H: side, W: side, C: 3, x: x.map((_, i) => rgba[i + Math.floor(i / 3)] / 127.5 - 1) });
  },
  decode(codes) {
    const { H, W, x } = decodeIndices(codes), rgba = new Uint8ClampedArray(4 * H * W).fill(255); // rounds and clips
    x.forEach((a, i) => (rgba[i + Math.floor(i / 3)] = (a + 1) * 127.5));
    return rgba;
  },
  /** All codes, those nearest to code k first. */
  neighbours(k) {
    const distance = Array.from({ length: codebook.O }, (_, i) => Math.hypot(...code(i).map((a, c) => a - code(k)[c])));
    return [...distance.keys()].sort((a, b) => distance[a] - distance[b]);
  },
  /** At each place the code nearest to the mean of several maps. */
  mean(maps) {
    const mean = (i) => code(0).map((_, c) => maps.reduce((sum, map) => sum + code(map[i])[c] / maps.length, 0));
    return maps[0].map((_, i) => nearestCode(mean(i), 1)[0]);
  },
  next: nextToken,
};

if (typeof document === "undefined")
  onmessage = ({ data: [id, name, args] }) => postMessage([id, answers[name](...args)]);
