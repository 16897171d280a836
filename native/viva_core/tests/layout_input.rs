//! No layout drops what the input of a weight needs done to it.

use viva_core::Error;
use viva_core::format::{Input, OptionValue};
use viva_core::layout::LAYOUTS;
use viva_core::ops::Cancel;
use viva_core::ops::quantize::quantize;
use viva_core::tensor::{DType, Tensor};
use viva_core::unit::Target;

fn named(name: &str) -> OptionValue {
    OptionValue::Name(name.into())
}

#[test]
fn layouts_refuse_rotated_and_scaled_inputs() {
    let values: Vec<f32> = (0..256 * 256).map(|i| ((i * 37) % 101) as f32).collect();
    let w = Tensor::from_slice(DType::F32, &[256, 256], &values).unwrap();
    let formats = ["int8", "int4", "nf4", "q4_k"];
    for layout in LAYOUTS {
        let mut held = 0;
        for format in formats {
            let Ok(target) = Target::resolve(format, Vec::new(), Some(layout.name())) else {
                continue;
            };
            held += 1;
            let mut q = quantize(&w, &target.spec, &Cancel::new()).unwrap();
            let name = match layout.name() {
                "gguf" => "model.layers.0.self_attn.o_proj.weight",
                _ => "a.weight",
            };
            assert!(layout.spell(name, &q).is_ok(), "{} {format}", layout.name());
            for (rotated, scaled) in [(true, false), (false, true), (true, true)] {
                q.spec.input = Input { rotated, scaled };
                let error = layout.spell(name, &q).unwrap_err();
                assert!(matches!(error, Error::LayoutMismatch { .. }), "{error}");
            }
        }
        assert!(held > 0, "{}", layout.name());
    }
}

#[test]
fn a_recipe_that_rotates_is_refused_before_anything_is_done() {
    for options in [
        vec![("method".into(), named("rotate"))],
        vec![
            ("method".into(), named("gptq")),
            ("rotate".into(), OptionValue::Bool(true)),
        ],
    ] {
        let Err(error) = Target::resolve("int4", options, None) else {
            panic!("a layout that holds rotations?");
        };
        assert!(matches!(error, Error::LayoutMismatch { .. }), "{error}");
    }
}
