#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| viva_core_fuzz::open("fuzzed.gguf", data));
