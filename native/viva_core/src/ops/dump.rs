//! A quantized tensor as one binary that crosses processes and nodes: a
//! safetensors image whose tensors are the parts and whose metadata is the
//! spec.

use std::collections::HashMap;
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::{self, Quantized, Spec};
use crate::tensor::{DType, SharedBytes, Tensor};

const KEY: &str = "viva_tensor.quantized";

#[derive(Serialize, Deserialize)]
struct Head {
    spec: Spec,
    shape: Vec<usize>,
    dtype: DType,
}

fn invalid(message: impl ToString) -> Error {
    Error::InvalidDump {
        message: message.to_string(),
    }
}

/// The dtypes of parts, as safetensors calls them.
fn stored_dtype(dtype: DType) -> Result<safetensors::Dtype> {
    Ok(match dtype {
        DType::F32 => safetensors::Dtype::F32,
        DType::F16 => safetensors::Dtype::F16,
        DType::BF16 => safetensors::Dtype::BF16,
        DType::F8E4M3 => safetensors::Dtype::F8_E4M3,
        DType::F8E5M2 => safetensors::Dtype::F8_E5M2,
        DType::F8E8M0 => safetensors::Dtype::F8_E8M0,
        DType::I32 => safetensors::Dtype::I32,
        DType::I8 => safetensors::Dtype::I8,
        DType::U8 => safetensors::Dtype::U8,
        other => return Err(invalid(format!("no part has dtype {}", other.name()))),
    })
}

/// Serializes `q`.
pub fn dump(q: &Quantized) -> Result<Vec<u8>> {
    let head = Head {
        spec: q.spec.clone(),
        shape: q.shape.clone(),
        dtype: q.dtype,
    };
    let head = serde_json::to_string(&head).map_err(invalid)?;
    let views = q
        .parts
        .iter()
        .map(|(name, t)| {
            let dtype = stored_dtype(t.dtype())?;
            let view = TensorView::new(dtype, t.shape().to_vec(), t.bytes()).map_err(invalid)?;
            Ok((*name, view))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([(KEY.to_string(), head)]);
    safetensors::serialize(views, Some(metadata)).map_err(invalid)
}

/// Reads a dump in place: the parts share `bytes`.
///
/// # Errors
/// `InvalidDump` for anything that [`dump`] did not write, and whatever
/// [`Quantized::validate`] finds.
pub fn load(bytes: SharedBytes) -> Result<Quantized> {
    let slice: &[u8] = bytes.as_ref().as_ref();
    let (_, metadata) = SafeTensors::read_metadata(slice).map_err(invalid)?;
    let head = metadata
        .metadata()
        .as_ref()
        .and_then(|m| m.get(KEY))
        .ok_or_else(|| invalid("its metadata names no format"))?;
    let Head { spec, shape, dtype } = serde_json::from_str(head).map_err(invalid)?;
    let format = spec.format()?;
    let options = format.options(&spec).into_iter();
    let options = options.map(|(name, v)| (name.to_string(), v)).collect();
    let given = Spec {
        input: spec.input,
        ..format::spec(&spec.format, options).map_err(invalid)?
    };
    if given != spec {
        return Err(invalid("no options give its spec"));
    }
    if !dtype.is_float() {
        return Err(invalid(format!("weights of dtype {}", dtype.name())));
    }
    let views = SafeTensors::deserialize(slice).map_err(invalid)?;
    let declared = spec.parts(&shape)?;
    if views.len() != declared.len() {
        return Err(invalid(format!(
            "{} parts where {} belong",
            views.len(),
            declared.len()
        )));
    }
    let parts = declared
        .into_iter()
        .map(|part| {
            let view = views.tensor(part.name).map_err(invalid)?;
            if view.dtype() != stored_dtype(part.dtype)? {
                return Err(invalid(format!("part {} of another dtype", part.name)));
            }
            let start = view.data().as_ptr().addr() - slice.as_ptr().addr();
            let range = start..start + view.data().len();
            Ok((
                part.name,
                Tensor::new(part.dtype, view.shape().to_vec(), Arc::clone(&bytes), range)?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let q = Quantized {
        spec,
        shape,
        dtype,
        parts,
    };
    q.validate()?;
    Ok(q)
}
