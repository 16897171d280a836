//! What several test files need: seeded data, specs from names, a run at every
//! ISA level.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

pub mod bars;
pub mod golden;
pub mod observed;

use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::process::Command;
use std::sync::Arc;

use viva_core::format::{Decode, FORMATS, OptionValue, Quantized, Spec, spec};
use viva_core::ops::metrics::Metrics;
use viva_core::ops::{Cancel, dequantize, matmul, metrics, pool, quantize};
use viva_core::simd;
use viva_core::simd::sink::Out;
use viva_core::tensor::{DType, Tensor, narrow};

/// SplitMix64: the same numbers on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// `n` draws of N(0, 1), by Box and Muller.
pub fn gaussian(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let mut out = Vec::with_capacity(n + 1);
    while out.len() < n {
        let r = (-2.0 * (1.0 - random.uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * random.uniform()).sin_cos();
        out.push((r * cos) as f32);
        out.push((r * sin) as f32);
    }
    out.truncate(n);
    out
}

pub fn name(v: &str) -> OptionValue {
    OptionValue::Name(v.into())
}

pub fn int(v: i64) -> OptionValue {
    OptionValue::Int(v)
}

pub fn yes(v: bool) -> OptionValue {
    OptionValue::Bool(v)
}

pub fn try_make(format: &str, options: &[(&str, OptionValue)]) -> viva_core::Result<Spec> {
    let options = options
        .iter()
        .map(|(n, v)| (n.to_string(), v.clone()))
        .collect();
    spec(format, options)
}

pub fn make(format: &str, options: &[(&str, OptionValue)]) -> Spec {
    try_make(format, options).unwrap()
}

/// One spec of every kind of arithmetic and of storage, with blocks that rows
/// of a multiple of 32 take.
pub fn every_spec() -> Vec<Spec> {
    let mse = || ("method", name("mse"));
    let block = |n| ("block_size", int(n));
    let symmetric = |v| ("symmetric", yes(v));
    let tensor = || ("block_size", name("tensor"));
    let row = || ("block_size", name("row"));
    let scale_dtype = |v| ("scale_dtype", name(v));
    let float = || ("zero_point", name("float"));
    vec![
        make("int8", &[]),
        make("int8", &[scale_dtype("f16")]),
        make("int8", &[symmetric(false)]),
        make("int8", &[tensor()]),
        make("int8", &[tensor(), symmetric(false)]),
        make("int8", &[block(32), mse()]),
        make("int8", &[block(16), symmetric(false), mse()]),
        make("int8", &[("scale", name("absmax"))]),
        make("int8", &[("scale", name("absmax")), tensor()]),
        make("int4", &[block(32)]),
        make("int4", &[block(32), mse()]),
        make("int4", &[row(), scale_dtype("bf16")]),
        make("int4", &[tensor(), scale_dtype("f32")]),
        make("int4", &[block(16), symmetric(true)]),
        make("int4", &[block(32), symmetric(true), mse()]),
        make("int6", &[block(32), scale_dtype("bf16")]),
        make("int5", &[block(16), symmetric(true)]),
        make("int3", &[block(32)]),
        make("int3", &[row(), symmetric(true), mse()]),
        make("int2", &[block(32), ("act_order", yes(true))]),
        make("int2", &[tensor(), symmetric(true)]),
        make("int8", &[block(32), float(), ("act_order", yes(true))]),
        make("int4", &[block(32), float()]),
        make("int3", &[block(16), float(), mse(), scale_dtype("bf16")]),
        make("int4", &[block(32), ("method", name("hqq"))]),
        make(
            "int2",
            &[row(), ("method", name("hqq")), scale_dtype("f32")],
        ),
        make("dynamic8", &[block(64)]),
        make("nf4", &[]),
        make("nf4", &[mse()]),
        make("nf4", &[block(32), ("double_quant", yes(true))]),
        make("fp4", &[block(128)]),
        make("fp4", &[mse(), ("double_quant", yes(true))]),
        make("fp8_e4m3", &[]),
        make("fp8_e4m3", &[block(32), mse(), scale_dtype("bf16")]),
        make("fp8_e4m3", &[tensor(), scale_dtype("f16")]),
        make("fp8_e5m2", &[block(16)]),
        make("mxfp8", &[]),
        make("mxfp8", &[mse()]),
        make("mxfp8_e5m2", &[("scale", name("bump"))]),
        make("mxfp4", &[]),
        make("mxfp4", &[("scale", name("round")), mse()]),
        make("nvfp4", &[]),
        make("nvfp4", &[mse()]),
        make("mxfp4", &[("scale", name("ggml"))]),
        make("nvfp4", &[("scale", name("ggml"))]),
        make("sparse24", &[]),
        make("sparse24", &[("values", name("f16"))]),
        make("sparse24", &[("values", name("int8")), mse()]),
        make(
            "sparse24",
            &[("values", name("int8")), tensor(), scale_dtype("f16")],
        ),
        make(
            "sparse24",
            &[("values", name("fp8_e4m3")), scale_dtype("bf16")],
        ),
        make("sparse24", &[("values", name("fp8_e4m3")), tensor()]),
        make("q8_0", &[]),
        make("q4_0", &[mse()]),
        make("q5_1", &[]),
        make("iq4_nl", &[]),
    ]
}

/// Formats that are stored as ggml's blocks.
pub fn block_formats() -> Vec<&'static str> {
    let names = FORMATS.iter().map(|f| f.name());
    let in_blocks = names.filter(|name| {
        let spec = make(name, &[]);
        let parts = spec.format().unwrap().parts(&spec, &[2, 256]);
        parts.is_ok_and(|p| p[0].name == "blocks")
    });
    let formats: Vec<_> = in_blocks.collect();
    assert!(formats.len() >= 12, "{formats:?}");
    formats
}

pub fn f32_tensor(shape: &[usize], data: &[f32]) -> Tensor {
    Tensor::from_slice(DType::F32, shape, data).unwrap()
}

/// The values rounded to `dtype`, at an address that no element may have.
pub fn unaligned_tensor(dtype: DType, shape: &[usize], data: &[f32]) -> Tensor {
    let mut bytes = vec![0u8; data.len() * dtype.size() + 1];
    narrow(dtype, data, &mut bytes[1..]).unwrap();
    let n = bytes.len();
    Tensor::new(dtype, shape.to_vec(), Arc::new(bytes), 1..n).unwrap()
}

/// The values rounded to `dtype`.
pub fn float_tensor(dtype: DType, shape: &[usize], data: &[f32]) -> Tensor {
    let mut bytes = vec![0u8; data.len() * dtype.size()];
    narrow(dtype, data, &mut bytes).unwrap();
    Tensor::from_slice(dtype, shape, &bytes).unwrap()
}

pub fn quantized(x: &Tensor, spec: &Spec) -> Quantized {
    let q = quantize::quantize(x, spec, &Cancel::new()).unwrap();
    q.validate().unwrap();
    q
}

/// Whether cargo asks for figures, as `cargo bench` does, and not only for a run that
/// tests, as `cargo test` and `cargo bench -- --test` do.
pub fn timed() -> bool {
    let asked = |flag: &str| std::env::args().any(|arg| arg == flag);
    asked("--bench") && !asked("--test")
}

/// x · qᵀ in the arithmetic of that name.
pub fn product(
    compute: &str,
    x: &Tensor,
    q: &Quantized,
    dtype: DType,
) -> viva_core::Result<Tensor> {
    let shape = matmul::matmul_shape(x, &q.shape)?;
    let mut out = vec![0u8; shape.iter().product::<usize>() * dtype.size()];
    matmul::by_name(compute)?(x, q, dtype.into(), &mut out, &Cancel::new())?;
    Tensor::from_slice(dtype, &shape, &out)
}

/// x · wᵀ in f64 for rows of k, and the same sums of magnitudes.
pub fn exact_product(x: &[f32], w: &[f32], k: usize) -> Vec<(f64, f64)> {
    let dot = |x: &[f32], w: &[f32]| {
        let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        terms.fold((0.0, 0.0), |(sum, size), v| (sum + v, size + v.abs()))
    };
    let row = |x| w.chunks_exact(k).map(move |w| dot(x, w));
    x.chunks_exact(k).flat_map(row).collect()
}

/// The same parts at other addresses.
pub fn copied(q: &Quantized) -> Quantized {
    let parts = q.parts.iter().map(|(name, part)| {
        let part = Tensor::from_slice(part.dtype(), part.shape(), part.bytes());
        (*name, part.unwrap())
    });
    Quantized {
        parts: parts.collect(),
        ..q.clone()
    }
}

/// The dequantized values as a tensor of `dtype`.
pub fn dequantized(q: &Quantized, dtype: DType) -> Tensor {
    let mut bytes = vec![0u8; dequantize::dequantized_len(q, dtype)];
    dequantize::dequantize_into(q, dtype, &mut bytes, &Cancel::new()).unwrap();
    Tensor::from_slice(dtype, &q.shape, &bytes).unwrap()
}

/// The elements of that range, the same near and past the caches.
pub fn decoded(decoder: &dyn Decode, range: Range<usize>) -> Vec<f32> {
    let mut near = vec![f32::NAN; range.len()];
    let mut past = near.clone();
    decoder.decode(range.start, &mut near);
    let out = Out {
        values: &mut past,
        past_caches: true,
    };
    decoder.decode_into(range.start, out);
    same(&near, &past, format_args!("{range:?} past the caches"));
    near
}

pub fn measure(x: &Tensor, spec: &Spec) -> (Metrics, f64) {
    let q = quantized(x, spec);
    let m = metrics::quantized(x, &q, &Cancel::new()).unwrap();
    (m, q.bits_per_weight())
}

/// Asserts that the bits are the same; shows the first that are not.
pub fn same(left: &[f32], right: &[f32], what: std::fmt::Arguments) {
    assert_eq!(left.len(), right.len(), "length of {what}");
    for (i, (a, b)) in left.iter().zip(right).enumerate() {
        assert!(
            a.to_bits() == b.to_bits(),
            "{a:e} is not {b:e} at {i}: {what}"
        );
    }
}

/// What a check computed, reduced to one number that levels must share.
#[derive(Default)]
pub struct Digest(DefaultHasher);

impl Digest {
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.write_usize(bytes.len());
        self.0.write(bytes);
    }

    pub fn parts(&mut self, q: &Quantized) {
        for (_, part) in &q.parts {
            self.bytes(part.bytes());
        }
    }
}

/// This test program again, under the emulator by which cargo runs it.
fn this_program() -> Command {
    let program = std::env::current_exe().unwrap();
    let arch = std::env::consts::ARCH.to_uppercase();
    let Ok(runner) = std::env::var(format!("CARGO_TARGET_{arch}_UNKNOWN_LINUX_GNU_RUNNER")) else {
        return Command::new(program);
    };
    let mut words = runner.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words).arg(program);
    command
}

/// Runs `check` at every ISA level that this machine has, each in a process of
/// its own, and asserts that all levels computed the same. `test` is the name
/// of the calling test. Where VIVA_TENSOR_ISA is set, that level alone runs.
pub fn on_every_level(test: &str, check: impl FnOnce(&mut Digest) + Send) {
    const FORCED: &str = "VIVA_TENSOR_ISA";
    const MARK: &str = "computed: ";
    if let Ok(forced) = std::env::var(FORCED) {
        assert_eq!(simd::configure().unwrap().name(), forced);
        let mut digest = Digest::default();
        // Inside the pool a call is a plain call, which many small ones need.
        pool::run(|| {
            check(&mut digest);
            Ok(())
        })
        .unwrap();
        println!("{MARK}{:016x}", digest.0.finish());
        return;
    }
    let mut computed = Vec::new();
    for level in simd::levels() {
        let run = this_program()
            .args(["--exact", test, "--nocapture"])
            .env(FORCED, level.name())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&run.stdout);
        let errors = String::from_utf8_lossy(&run.stderr);
        assert!(
            run.status.success(),
            "{test} at {}:\n{output}{errors}",
            level.name()
        );
        // No mark: the name selected no test.
        let at = output.find(MARK).expect(test) + MARK.len();
        computed.push((level.name(), output[at..at + 16].to_string()));
    }
    let (_, first) = &computed[0];
    assert!(computed.iter().all(|(_, c)| c == first), "{computed:?}");
}
