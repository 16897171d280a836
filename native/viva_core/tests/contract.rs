//! Adding a format touches its file, the registry and the layouts that hold it:
//! no other source may know a format by its name.

use std::fs;
use std::path::Path;

use viva_core::format::FORMATS;

/// Where names belong. LLM.int8() is an arithmetic of one format, and int8 the name
/// of one for many; a conversion prefers some formats to others: it does without new
/// ones; codes of vectors are of three kinds, two of which are called what the formats
/// are that multiply them.
const KNOW_NAMES: [&str; 7] = [
    "format.rs",
    "formats/",
    "layout/",
    "ops/int8.rs",
    "ops/llm_int8.rs",
    "transcode/",
    "vectors/",
];

fn sources(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn names_of_formats_stay_in_formats_and_layouts() {
    let core = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let nif = core.join("../../viva_nif/src");
    let mut wrong = Vec::new();
    for root in [core, nif] {
        let mut found = Vec::new();
        sources(&root, &mut found);
        assert!(found.len() > 5);
        for path in found {
            let relative = path.strip_prefix(&root).unwrap();
            let relative = relative.to_string_lossy().replace('\\', "/");
            if KNOW_NAMES.iter().any(|known| relative.starts_with(known)) {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            // Tests may take any format for an example.
            let code = text.split("#[cfg(test)]").next().unwrap();
            for format in FORMATS {
                if code.contains(&format!("\"{}\"", format.name())) {
                    wrong.push(format!("{relative} names {}", format.name()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
