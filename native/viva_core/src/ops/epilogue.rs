//! What becomes of a product's sums on their way to memory.

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor, narrow};

/// Bias and residual are added in f32, the bias first, and a result is rounded to
/// its dtype once.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue<'a> {
    pub dtype: DType,
    /// A number for each row of the weights.
    pub bias: Option<&'a Tensor>,
    /// A number for each result.
    pub residual: Option<&'a Tensor>,
}

impl From<DType> for Epilogue<'_> {
    fn from(dtype: DType) -> Self {
        Epilogue {
            dtype,
            bias: None,
            residual: None,
        }
    }
}

impl Epilogue<'_> {
    /// Whether results of that shape, of at least one dimension, can be made so.
    pub(super) fn check(&self, shape: &[usize]) -> Result<()> {
        floats("a matmul's result", self.dtype)?;
        let added = [
            ("bias", self.bias, &shape[shape.len() - 1..]),
            ("residual", self.residual, shape),
        ];
        for (what, tensor, expected) in added {
            let Some(tensor) = tensor else { continue };
            floats(&format!("a matmul's {what}"), tensor.dtype())?;
            if tensor.shape() != expected {
                return Err(Error::ShapeMismatch {
                    what: format!("the {what} of a matmul"),
                    expected: expected.to_vec(),
                    actual: tensor.shape().to_vec(),
                });
            }
        }
        Ok(())
    }

    /// Writes consecutive results of one row, the first of them in that column.
    pub(super) fn write(
        &self,
        (row, column): (usize, usize),
        sums: &mut [f32],
        out: &mut [u8],
    ) -> Result<()> {
        let mut scratch = Vec::new();
        let added = [(self.bias, 0), (self.residual, row)];
        for (tensor, row) in added {
            let Some(tensor) = tensor else { continue };
            let from = row * tensor.row_len() + column;
            let values = tensor.f32_chunk(from..from + sums.len(), &mut scratch);
            for (sum, v) in sums.iter_mut().zip(values) {
                *sum += v;
            }
        }
        narrow(self.dtype, sums, out)
    }

    /// Writes rows of n sums of no products.
    pub(super) fn write_zeros(&self, n: usize, out: &mut [u8]) -> Result<()> {
        let mut sums = vec![0f32; n];
        let rows = out.chunks_exact_mut((n * self.dtype.size()).max(1));
        for (row, out) in rows.enumerate() {
            sums.fill(0.0);
            self.write((row, 0), &mut sums, out)?;
        }
        Ok(())
    }
}

/// Whether `op` takes a tensor of that dtype.
pub(super) fn floats(op: &str, dtype: DType) -> Result<()> {
    match dtype.is_float() {
        true => Ok(()),
        false => Err(Error::UnsupportedDtype {
            op: op.into(),
            dtype: dtype.name().into(),
        }),
    }
}
