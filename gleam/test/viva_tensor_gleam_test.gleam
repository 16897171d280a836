import viva_tensor
import viva_tensor/checkpoint.{Compressed, Dense}
import viva_tensor/error
import viva_tensor/format.{type Format}
import viva_tensor/job
import viva_tensor/layout
import viva_tensor/method
import viva_tensor/number.{Finite, Infinity, NegInfinity, NotANumber}
import viva_tensor/packed
import viva_tensor/quantized
import viva_tensor/setting.{BlockSize, DoubleQuant}
import viva_tensor/tensor.{type Tensor, F16, F32, U8}

/// Runs every public function of this module whose name ends in `_test`.
@external(erlang, "viva_tensor_gleam_test_ffi", "main")
pub fn main() -> Nil

/// A directory that vanishes with the run.
@external(erlang, "viva_tensor_gleam_test_ffi", "directory")
fn directory() -> String

@external(erlang, "viva_tensor_gleam_test_ffi", "model")
fn model() -> String

@external(erlang, "viva_tensor_gleam_test_ffi", "wave")
fn wave(elements: Int) -> List(Float)

fn matrix(rows: Int, columns: Int) -> Tensor {
  let assert Ok(tensor) =
    tensor.from_list(wave(rows * columns), dtype: F32, shape: [rows, columns])
  tensor
}

pub fn bits_make_a_tensor_and_come_back_test() {
  let bits = <<1.0:little-float-size(32), -2.5:little-float-size(32)>>
  let assert Ok(tensor) = tensor.from_bits(bits, dtype: F32, shape: [2])
  assert tensor.dtype(tensor) == F32
  assert tensor.shape(tensor) == [2]
  assert tensor.to_bits(tensor) == Ok(bits)
  assert tensor.to_list(tensor) == Ok([Finite(1.0), Finite(-2.5)])
}

pub fn bits_of_another_size_are_refused_test() {
  let assert Error(error.SizeMismatch(op:, expected: 8, actual: 1, ..)) =
    tensor.from_bits(<<0>>, dtype: F32, shape: [2])
  assert op == "from_binary"
  let assert Error(error.InvalidOption(option: "bits", ..)) =
    tensor.from_bits(<<0:size(31)>>, dtype: F32, shape: [1])
}

pub fn impossible_shapes_are_refused_test() {
  let assert Error(error.InvalidOption(option: "shape", ..)) =
    tensor.from_list([], dtype: F32, shape: [-1])
  let most = 9_223_372_036_854_775_807
  let assert Error(error.ShapeOverflow(shape:, ..)) =
    tensor.from_bits(<<>>, dtype: F32, shape: [most, most])
  assert shape == [most, most]
  let assert Error(error.ShapeOverflow(..)) =
    tensor.from_bits(<<>>, dtype: F32, shape: [most + 1])
}

pub fn numbers_that_are_no_floats_have_names_test() {
  let bits = <<
    0x7c00:little-size(16),
    0xfc00:little-size(16),
    0x7e00:little-size(16),
  >>
  let assert Ok(tensor) = tensor.from_bits(bits, dtype: F16, shape: [3])
  assert tensor.to_list(tensor) == Ok([Infinity, NegInfinity, NotANumber])
  assert number.to_float(Infinity) == Error(Nil)
  assert number.to_float(Finite(0.5)) == Ok(0.5)
}

pub fn integers_are_numbers_too_test() {
  let assert Ok(tensor) = tensor.from_bits(<<1, 255>>, dtype: U8, shape: [2])
  assert tensor.to_list(tensor) == Ok([Finite(1.0), Finite(255.0)])
  let assert Ok(tensor) =
    tensor.from_bits(<<1, 0>>, dtype: tensor.Bool, shape: [2])
  assert tensor.to_list(tensor) == Ok([Finite(1.0), Finite(0.0)])
  let assert Error(error.UnsupportedDtype(dtype: "bool", ..)) =
    viva_tensor.quantize(tensor, to: format.Int8, with: [])
}

pub fn a_cast_rounds_test() {
  let assert Ok(tensor) =
    tensor.from_list([0.1, -3.3, 1000.0], dtype: F32, shape: [3])
  let assert Ok(cast) = tensor.cast(tensor, to: tensor.F8E4m3)
  assert tensor.dtype(cast) == tensor.F8E4m3
  assert tensor.to_list(cast)
    == Ok([Finite(0.1015625), Finite(-3.25), Finite(448.0)])
  let assert Error(error.UnsupportedDtype(dtype: "u8", ..)) =
    tensor.cast(tensor, to: U8)
}

pub fn a_released_tensor_says_so_test() {
  let tensor = matrix(2, 32)
  assert tensor.release(tensor) == Nil
  let assert Error(error.Released(op: "to_list", ..)) = tensor.to_list(tensor)
}

pub fn every_format_quantizes_and_comes_back_test() {
  let formats = format.all()
  assert quantize_each(formats, matrix(4, 256)) == count(formats)
}

fn quantize_each(formats: List(Format), weight: Tensor) -> Int {
  case formats {
    [] -> 0
    [format, ..rest] -> {
      let assert Ok(q) = viva_tensor.quantize(weight, to: format, with: [])
      assert quantized.format(q) == format
      assert quantized.shape(q) == [4, 256]
      assert quantized.dtype(q) == F32
      assert quantized.nbytes(q) > 0
      let assert Ok(back) = viva_tensor.dequantize(q, to: F32)
      assert tensor.shape(back) == [4, 256]
      1 + quantize_each(rest, weight)
    }
  }
}

pub fn formats_have_the_names_of_the_command_line_test() {
  assert format.name(of: format.Q80) == "q8_0"
  assert format.name(of: format.Q4K) == "q4_k"
  assert format.name(of: format.Fp8E4m3) == "fp8_e4m3"
}

pub fn settings_are_taken_test() {
  let weight = matrix(16, 256)
  let assert Ok(plain) = viva_tensor.quantize(weight, to: format.Nf4, with: [])
  let assert Ok(double) =
    viva_tensor.quantize(weight, to: format.Nf4, with: [
      BlockSize(64),
      DoubleQuant(True),
    ])
  assert quantized.bits_per_weight(plain) == 4.5
  assert quantized.bits_per_weight(double) <. 4.5

  let settings = [
    #(format.Int8, setting.ScalesPer(setting.WholeTensor)),
    #(format.Int8, setting.ScalesPer(setting.Row)),
    #(format.Int8, setting.Scale(setting.Absmax)),
    #(format.Int8, setting.ScaleDtype(tensor.Bf16)),
    #(format.Int4, setting.Symmetric(True)),
    #(format.Int4, setting.ZeroPoint(setting.Float)),
    #(format.Int4, setting.Method(method.Hqq)),
    #(format.Int4, setting.Method(method.Mse)),
    #(format.Mxfp4, setting.Scale(setting.Ggml)),
    #(format.Sparse24, setting.Values(setting.Bf16)),
  ]
  assert quantize_with(settings, weight) == 10
}

fn quantize_with(
  settings: List(#(Format, setting.Setting)),
  weight: Tensor,
) -> Int {
  case settings {
    [] -> 0
    [#(format, setting), ..rest] -> {
      let assert Ok(_) =
        viva_tensor.quantize(weight, to: format, with: [setting])
      1 + quantize_with(rest, weight)
    }
  }
}

pub fn methods_look_at_activations_test() {
  let weight = matrix(32, 128)
  let seen = matrix(64, 128)
  let assert Ok(q) =
    viva_tensor.quantize(weight, to: format.Int4, with: [
      setting.Method(method.Awq),
      setting.Activations(seen),
      setting.Scales(method.Mse),
      setting.DuoScaling(setting.Both),
      setting.Clip(False),
    ])
  let assert Ok(Finite(error)) =
    viva_tensor.output_error(of: q, against: weight, on: seen)
  assert error >. 0.0 && error <. 0.5

  let assert Ok(_) =
    viva_tensor.quantize(weight, to: format.Int4, with: [
      setting.Method(method.Gptq),
      setting.Activations(seen),
      setting.Order(setting.Activation),
      setting.Damping(0.1),
    ])
  let assert Error(error.InvalidOption(option: "activations", ..)) =
    viva_tensor.quantize(weight, to: format.Int4, with: [
      setting.Method(method.Gptq),
    ])
}

pub fn what_a_format_does_not_have_is_refused_test() {
  let weight = matrix(2, 100)
  let assert Error(error.InvalidOption(op: "quantize", option:, ..)) =
    viva_tensor.quantize(weight, to: format.Int8, with: [DoubleQuant(True)])
  assert option == "double_quant"
  let assert Error(error.InvalidOption(option: "block_size", ..)) =
    viva_tensor.quantize(weight, to: format.Nf4, with: [BlockSize(-1)])
  let assert Error(error.Indivisible(row: 100, block: 256, ..)) =
    viva_tensor.quantize(weight, to: format.Q4K, with: [])
}

pub fn weights_that_are_not_finite_are_counted_test() {
  let bits = <<0x7c00:little-size(16), 0x7e00:little-size(16)>>
  let assert Ok(tensor) = tensor.from_bits(bits, dtype: F16, shape: [2])
  let assert Error(error.NonFinite(nan: 1, inf: 1, ..) as error) =
    viva_tensor.quantize(tensor, to: format.Int8, with: [])
  assert error.op == "quantize"
  assert error.message != ""
}

pub fn products_are_those_of_the_weights_test() {
  let assert Ok(weight) =
    tensor.from_list([1.0, -1.0, 0.0, 1.0], dtype: F32, shape: [2, 2])
  let assert Ok(q) = viva_tensor.quantize(weight, to: format.Int8, with: [])
  let assert Ok(x) = tensor.from_list([1.0, 0.0], dtype: F32, shape: [1, 2])
  let assert Ok(y) = viva_tensor.matmul(x, by: q, with: [])
  assert tensor.shape(y) == [1, 2]
  assert tensor.to_list(y) == Ok([Finite(1.0), Finite(0.0)])

  let assert Ok(bias) = tensor.from_list([10.0, 20.0], dtype: F32, shape: [2])
  let assert Ok(y) =
    viva_tensor.matmul(x, by: q, with: [
      viva_tensor.Dtype(tensor.Bf16),
      viva_tensor.Compute(viva_tensor.F32),
      viva_tensor.Bias(bias),
      viva_tensor.Residual(y),
    ])
  assert tensor.dtype(y) == tensor.Bf16
  assert tensor.to_list(y) == Ok([Finite(12.0), Finite(20.0)])

  let assert Error(error.ShapeMismatch(expected:, actual:, ..)) =
    viva_tensor.matmul(bias, by: q, with: [viva_tensor.Bias(x)])
  assert expected != actual
}

pub fn packed_weights_multiply_test() {
  let weight = matrix(8, 64)
  let assert Ok(q) = viva_tensor.quantize(weight, to: format.Q40, with: [])
  let assert Ok(packed) = viva_tensor.prepack(q)
  assert packed.format(packed) == format.Q40
  assert packed.shape(packed) == [8, 64]
  assert packed.nbytes(packed) > 0
  let x = matrix(2, 64)
  let eight_bits = [viva_tensor.Compute(viva_tensor.Int8)]
  let assert Ok(expected) = viva_tensor.matmul(x, by: q, with: eight_bits)
  let assert Ok(y) = viva_tensor.matmul_packed(x, by: packed, with: [])
  assert tensor.to_bits(y) == tensor.to_bits(expected)
  assert packed.release(packed) == Nil
  let assert Error(error.Released(..)) =
    viva_tensor.matmul_packed(x, by: packed, with: [])
}

pub fn metrics_tell_how_close_it_is_test() {
  let weight = matrix(16, 256)
  let assert Ok(q) = viva_tensor.quantize(weight, to: format.Nf4, with: [])
  let assert Ok(metrics) = viva_tensor.metrics(of: q, against: weight)
  let assert Finite(sqnr_db) = metrics.sqnr_db
  assert sqnr_db >. 18.0
  assert metrics.bits_per_weight == 4.5

  let assert Ok(ones) =
    tensor.from_list([1.0, -1.0, 1.0, 1.0], dtype: F32, shape: [2, 2])
  let assert Ok(q) = viva_tensor.quantize(ones, to: format.Nf4, with: [])
  let assert Ok(metrics) = viva_tensor.metrics(of: q, against: ones)
  assert metrics.sqnr_db == Infinity
}

pub fn a_dump_is_loaded_test() {
  let assert Ok(q) =
    viva_tensor.quantize(matrix(2, 64), to: format.Fp4, with: [])
  let assert Ok(bits) = quantized.dump(q)
  let assert Ok(loaded) = quantized.load(bits)
  assert quantized.format(loaded) == format.Fp4
  assert quantized.dump(loaded) == Ok(bits)
  let assert Error(error.InvalidDump(..)) = quantized.load(<<"no dump">>)
  let assert Error(error.InvalidDump(..)) = quantized.load(<<0:size(3)>>)
  assert quantized.release(q) == Nil
}

pub fn a_checkpoint_is_inspected_test() {
  let assert Ok(checkpoint) = checkpoint.open(model())
  let assert Ok([first, ..] as contents) = checkpoint.contents(checkpoint)
  assert first.name == "model.embed_tokens.weight"
  assert first.format == "bf16"
  assert first.layout == Error(Nil)
  assert count(contents) == 20
  assert checkpoint.total_bytes(checkpoint) > 2_000_000
  let assert Ok(Dense(norm)) =
    checkpoint.get(checkpoint, name: "model.norm.weight")
  assert tensor.shape(norm) == [256]
  let assert Error(error.UnknownTensor(name: "model.nrm", ..)) =
    checkpoint.get(checkpoint, name: "model.nrm")
  assert checkpoint.release(checkpoint) == Nil
  let assert Error(error.Io(code: "enoent", ..)) =
    checkpoint.open("no/such/model")
}

pub fn a_job_compresses_and_converts_test() {
  let directory = directory()
  let to = directory <> "/nf4"
  let assert Ok(started) =
    job.start(
      job.Quantize(format.Nf4, [DoubleQuant(True)]),
      from: model(),
      to:,
      with: [
        job.Exclude(["layers\\.0\\."]),
        job.MemoryLimit("64MB"),
        job.NonFinite(job.Keep),
        job.Priority(job.High),
      ],
    )
  let assert Ok(job.Complete(report)) = job.await(started, within: job.Forever)
  assert report.target == to
  assert report.quantized == 7
  assert report.ratio >. 1.0
  assert report.put_aside == []
  let assert Ok(bits) = report.bits_per_weight
  assert bits >. 4.0 && bits <. 4.5
  assert count(report.tensors) == 20
  let assert Ok(status) = job.status(started)
  assert status.state == job.Done
  assert status.tensors_done == status.tensors

  let assert Ok(checkpoint) = checkpoint.open(to)
  let name = "model.layers.1.mlp.up_proj.weight"
  let assert Ok(Compressed(q)) = checkpoint.get(checkpoint, name:)
  assert quantized.format(q) == format.Nf4

  let assert Ok(again) =
    job.start(job.Recipe("nf4", []), from: model(), to:, with: [
      job.Layout(layout.CompressedTensors),
    ])
    |> refused
  assert again == "layout_mismatch"

  let plain = directory <> "/plain"
  let assert Ok(converting) =
    job.start(job.Convert(layout.Plain), from: to, to: plain, with: [
      job.Dtype(tensor.F32),
    ])
  let assert Ok(job.Complete(report)) =
    job.await(converting, within: job.Milliseconds(600_000))
  assert report.sqnr_db == Error(Nil)
}

pub fn a_job_is_cancelled_and_gone_on_with_test() {
  let to = directory() <> "/int8"
  let assert Error(error.NothingToResume(..)) = job.resume(to, with: [])
  let assert Ok(first) =
    job.start(job.Recipe("int8", []), from: model(), to:, with: [
      job.MaxConcurrency(1),
    ])
  case job.cancel(first) {
    Error(error.Cancelled(..)) -> {
      let assert Ok(second) =
        job.start(job.Recipe("int8", []), from: model(), to:, with: [
          job.Resume(True),
        ])
      let assert Ok(job.Complete(_)) = job.await(second, within: job.Forever)
      Nil
    }
    // It was done before it was told.
    Ok(job.Complete(_)) -> Nil
    other -> panic as kind(other)
  }
}

pub fn a_job_that_makes_no_sense_is_refused_test() {
  let assert Error(error.UnknownRecipe(name: "best", ..)) =
    job.start(job.Recipe("best", []), from: model(), to: "out", with: [])
  let assert Error(error.InvalidOption(option: "to", ..)) =
    job.start(job.Quantize(format.Nf4, []), from: model(), to: "", with: [])
  let assert Error(error.InvalidOption(option: "memory_limit", ..)) =
    job.start(job.Quantize(format.Nf4, []), from: model(), to: "out", with: [
      job.MemoryLimit("much"),
    ])
  let assert Ok(lost) =
    job.start(
      job.Quantize(format.Nf4, []),
      from: "no/such/model",
      to: "out",
      with: [],
    )
  let assert Error(error.Io(code: "enoent", ..)) =
    job.await(lost, within: job.Forever)
}

fn kind(result: Result(value, error.Error)) -> String {
  case result {
    Ok(_) -> "done"
    Error(error) -> error.message
  }
}

fn refused(result: Result(value, error.Error)) -> Result(String, Nil) {
  case result {
    Ok(_) -> Error(Nil)
    Error(error.LayoutMismatch(..)) -> Ok("layout_mismatch")
    Error(other) -> Ok(other.message)
  }
}

fn count(list: List(element)) -> Int {
  case list {
    [] -> 0
    [_, ..rest] -> 1 + count(rest)
  }
}
