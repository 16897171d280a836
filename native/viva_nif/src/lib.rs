//! The NIF library of viva_tensor: terms in, `viva_core`, terms out. No
//! arithmetic lives here.

mod calibration;
mod checkpoint;
mod conversion;
mod error;
mod job;
mod json;
mod product;
mod quantized;
mod record;
mod resource;
mod system;
mod tensor;
mod terms;
mod vectors;

rustler::init!("Elixir.VivaTensor.Native");
