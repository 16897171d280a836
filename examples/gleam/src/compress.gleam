//// Compresses one weight, multiplies with it, and then a whole model in a job.
////
////     gleam run -- MODEL TARGET

import viva_tensor
import viva_tensor/checkpoint
import viva_tensor/error.{type Error}
import viva_tensor/format
import viva_tensor/job
import viva_tensor/number.{type Number, Finite}
import viva_tensor/quantized
import viva_tensor/setting
import viva_tensor/tensor

pub fn main() -> Nil {
  let #(model, target) = case arguments() {
    [model, target] -> #(model, target)
    _ -> #("../models/viva-tiny", "viva-tiny-nf4")
  }

  case one_weight(model), whole_model(model, target) {
    Ok(Nil), Ok(Nil) -> Nil
    Error(error), _ | _, Error(error) -> panic as error.message
  }
}

fn one_weight(model: String) -> Result(Nil, Error) {
  use checkpoint <- try(checkpoint.open(model))
  let name = "model.layers.0.mlp.up_proj.weight"
  use found <- try(checkpoint.get(checkpoint, name:))
  let assert checkpoint.Dense(weight) = found as "quantized already"

  let settings = [setting.BlockSize(64), setting.DoubleQuant(True)]
  use q <- try(viva_tensor.quantize(weight, to: format.Nf4, with: settings))
  use metrics <- try(viva_tensor.metrics(of: q, against: weight))
  print(name)
  print("  bits per weight  " <> decimals(quantized.bits_per_weight(q)))
  print("  SQNR dB          " <> text(metrics.sqnr_db))

  use x <- try(
    tensor.from_list(halves(256), dtype: tensor.F32, shape: [1, 256]),
  )
  use y <- try(viva_tensor.matmul(x, by: q, with: []))
  use elements <- try(tensor.to_list(y))
  let assert [first, ..] = elements
  print("  first of x · wᵀ  " <> text(first))
  Ok(Nil)
}

fn whole_model(model: String, target: String) -> Result(Nil, Error) {
  let work = job.Quantize(format.Nf4, [setting.DoubleQuant(True)])
  let options = [job.Force(True), job.MemoryLimit("256MB")]
  use job <- try(job.start(work, from: model, to: target, with: options))
  use outcome <- try(job.await(job, within: job.Forever))

  case outcome {
    job.Complete(report) -> {
      print(report.target)
      print("  times smaller    " <> decimals(report.ratio))
      Ok(Nil)
    }
    job.Partial(_) -> {
      print("a tensor could not be done: see mix viva.jobs report")
      Ok(Nil)
    }
  }
}

fn text(number: Number) -> String {
  case number {
    Finite(float) -> decimals(float)
    _ -> "not finite"
  }
}

fn halves(count: Int) -> List(Float) {
  case count {
    0 -> []
    _ -> [0.5, ..halves(count - 1)]
  }
}

fn try(
  result: Result(value, Error),
  then: fn(value) -> Result(next, Error),
) -> Result(next, Error) {
  case result {
    Ok(value) -> then(value)
    Error(error) -> Error(error)
  }
}

// What a project of its own takes from gleam_stdlib and argv.

@external(erlang, "compress_ffi", "print")
fn print(line: String) -> Nil

@external(erlang, "compress_ffi", "decimals")
fn decimals(float: Float) -> String

@external(erlang, "compress_ffi", "arguments")
fn arguments() -> List(String)
