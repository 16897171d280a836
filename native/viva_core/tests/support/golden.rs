//! The fixtures that other programs wrote: test/golden.

use safetensors::SafeTensors;
use viva_core::tensor::{DType, Tensor};

pub struct Golden(Vec<u8>);

impl Golden {
    /// The fixture of that name.
    pub fn open(name: &str) -> Golden {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../test/golden");
        Golden(std::fs::read(format!("{golden}/{name}.safetensors")).unwrap())
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    pub fn tensor(&self, name: &str) -> Tensor {
        let file = self.file();
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        let dtype = match view.dtype() {
            safetensors::Dtype::F64 => DType::F64,
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::BF16,
            safetensors::Dtype::F8_E4M3 => DType::F8E4M3,
            safetensors::Dtype::I64 => DType::I64,
            safetensors::Dtype::I32 => DType::I32,
            safetensors::Dtype::I8 => DType::I8,
            safetensors::Dtype::U32 => DType::U32,
            safetensors::Dtype::U8 => DType::U8,
            other => panic!("{name}: {other:?}"),
        };
        Tensor::from_slice(dtype, view.shape(), view.data()).unwrap()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.tensor(name).to_f32_vec()
    }

    /// Prefixes of the names that end in `/{last}`.
    pub fn cases(&self, last: &str) -> Vec<String> {
        let last = format!("/{last}");
        let file = self.file();
        let names = file.names();
        let prefixes = names.into_iter().filter_map(|n| n.strip_suffix(&last));
        let mut cases: Vec<String> = prefixes.map(String::from).collect();
        cases.sort();
        cases
    }
}
