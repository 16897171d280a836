//! Quality on N(0, 1): SQNR and bits per weight that each format must reach.

mod support;

use std::collections::BTreeSet;

use support::bars::bars;
use support::{f32_tensor, gaussian, measure};
use viva_core::format::FORMATS;

#[test]
fn every_format_reaches_its_sqnr_on_a_gaussian() {
    let x = f32_tensor(&[1024, 4096], &gaussian(1024 * 4096, 1));
    let mut missed = Vec::new();
    for bar in bars().sqnr {
        let (m, bpw) = measure(&x, &bar.recipe.spec());
        let (db, bits) = (bar.sqnr_db, bar.bits_per_weight);
        let figures = format!(
            "{:?}: {:.3} dB of {db}, {bpw:.3} bpw of {bits}",
            bar.recipe, m.sqnr_db
        );
        println!("{figures}");
        // The bars are given to two digits of a decibel and three of a bit.
        if m.sqnr_db < db - 0.005 || bpw > bits + 0.0005 {
            missed.push(figures);
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn every_format_has_a_bar() {
    let named: BTreeSet<String> = bars().sqnr.into_iter().map(|b| b.recipe.format).collect();
    for format in FORMATS {
        assert!(named.contains(format.name()), "{}", format.name());
    }
}

#[test]
fn four_bit_errors_are_those_of_bitsandbytes() {
    let x = f32_tensor(&[1024, 1024], &gaussian(1024 * 1024, 7));
    for bar in bars().mean_error {
        let (m, _) = measure(&x, &bar.recipe.spec());
        // Draws of that size differ by a standard deviation of 1e-4.
        let close = (m.mean_error - bar.mean_error).abs() < 4e-4;
        assert!(close, "{:?}: {}", bar.recipe, m.mean_error);
    }
}
