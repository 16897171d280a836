//! ggml's types as GGUF files number them: for each its name, how many elements
//! a block holds and how many bytes a block fills.

/// One type of ggml.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlType {
    /// The number that stands in a GGUF file.
    pub id: u32,
    /// ggml's name in lower case; the name of our format or dtype where we have
    /// one.
    pub name: &'static str,
    /// Elements of one block; rows are a multiple of it. 1 for dense types.
    pub block_len: usize,
    /// Bytes of one block.
    pub block_bytes: usize,
}

const fn ggml_type(id: u32, name: &'static str, block_len: usize, block_bytes: usize) -> GgmlType {
    GgmlType {
        id,
        name,
        block_len,
        block_bytes,
    }
}

/// Numbers that ggml gave up, or that live in memory only.
const NOT_IN_FILES: [(u32, &str); 10] = [
    (4, "q4_2"),
    (5, "q4_3"),
    (9, "q8_1"),
    (15, "q8_k"),
    (31, "q4_0_4_4"),
    (32, "q4_0_4_8"),
    (33, "q4_0_8_8"),
    (36, "iq4_nl_4_4"),
    (37, "iq4_nl_4_8"),
    (38, "iq4_nl_8_8"),
];

/// Every type that may stand in a file.
pub const GGML_TYPES: [GgmlType; 33] = [
    ggml_type(0, "f32", 1, 4),
    ggml_type(1, "f16", 1, 2),
    ggml_type(2, "q4_0", 32, 18),
    ggml_type(3, "q4_1", 32, 20),
    ggml_type(6, "q5_0", 32, 22),
    ggml_type(7, "q5_1", 32, 24),
    ggml_type(8, "q8_0", 32, 34),
    ggml_type(10, "q2_k", 256, 84),
    ggml_type(11, "q3_k", 256, 110),
    ggml_type(12, "q4_k", 256, 144),
    ggml_type(13, "q5_k", 256, 176),
    ggml_type(14, "q6_k", 256, 210),
    ggml_type(16, "iq2_xxs", 256, 66),
    ggml_type(17, "iq2_xs", 256, 74),
    ggml_type(18, "iq3_xxs", 256, 98),
    ggml_type(19, "iq1_s", 256, 50),
    ggml_type(20, "iq4_nl", 32, 18),
    ggml_type(21, "iq3_s", 256, 110),
    ggml_type(22, "iq2_s", 256, 82),
    ggml_type(23, "iq4_xs", 256, 136),
    ggml_type(24, "i8", 1, 1),
    ggml_type(25, "i16", 1, 2),
    ggml_type(26, "i32", 1, 4),
    ggml_type(27, "i64", 1, 8),
    ggml_type(28, "f64", 1, 8),
    ggml_type(29, "iq1_m", 256, 56),
    ggml_type(30, "bf16", 1, 2),
    ggml_type(34, "tq1_0", 256, 54),
    ggml_type(35, "tq2_0", 256, 66),
    ggml_type(39, "mxfp4", 32, 17),
    ggml_type(40, "nvfp4", 64, 36),
    ggml_type(41, "q1_0", 128, 18),
    ggml_type(42, "q2_0", 64, 18),
];

impl GgmlType {
    /// The type of that number.
    pub fn by_id(id: u32) -> Option<&'static GgmlType> {
        GGML_TYPES.iter().find(|t| t.id == id)
    }

    /// The name of a number that has no place in files any more.
    pub fn name_not_in_files(id: u32) -> Option<&'static str> {
        let found = NOT_IN_FILES.iter().find(|(given_up, _)| *given_up == id);
        found.map(|(_, name)| *name)
    }

    /// The type of that name.
    pub const fn by_name(name: &str) -> Option<&'static GgmlType> {
        let mut i = 0;
        while i < GGML_TYPES.len() {
            if same(GGML_TYPES[i].name.as_bytes(), name.as_bytes()) {
                return Some(&GGML_TYPES[i]);
            }
            i += 1;
        }
        None
    }

    /// Bytes of a row of `len` elements; `None` unless whole blocks fill it.
    pub fn row_bytes(&self, len: usize) -> Option<usize> {
        match len % self.block_len {
            0 => (len / self.block_len).checked_mul(self.block_bytes),
            _ => None,
        }
    }
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_found_by_number_and_name() {
        for t in &GGML_TYPES {
            assert_eq!(GgmlType::by_id(t.id), Some(t));
            assert_eq!(GgmlType::by_name(t.name), Some(t));
        }
        for (id, _) in NOT_IN_FILES {
            assert_eq!(GgmlType::by_id(id), None);
        }
        assert_eq!(GgmlType::by_name("q4_2"), None);
        let q4_k = GgmlType::by_name("q4_k").unwrap();
        assert_eq!(q4_k.row_bytes(512), Some(288));
        assert_eq!(q4_k.row_bytes(128), None);
        assert_eq!(
            q4_k.row_bytes(usize::MAX - 255),
            Some(usize::MAX / 256 * 144)
        );
        let q8_0 = GgmlType::by_name("q8_0").unwrap();
        assert_eq!(q8_0.row_bytes(usize::MAX - 31), None);
    }
}
