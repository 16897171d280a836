//! NumPy's `.npy` files: a magic string, a header that is a Python dictionary, then
//! the data.

use crate::tensor::DType;

pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// A matrix that a file says it holds.
#[derive(Debug, PartialEq)]
pub(super) struct Header {
    pub dtype: DType,
    pub rows: usize,
    pub columns: usize,
    /// Where in the file the data starts.
    pub data_start: usize,
}

impl Header {
    /// Reads the header of a whole file, or says what is wrong with it or what is not read.
    pub fn read(file: &[u8]) -> Result<Header, String> {
        let (text, data_start) = text(file).ok_or("ends in the middle of its header")?;
        let text = std::str::from_utf8(text).map_err(|_| "has a header that is no text")?;
        let dtype = match value(text, "descr")? {
            "'<f2'" => DType::F16,
            "'<f4'" => DType::F32,
            "'<f8'" => DType::F64,
            other => {
                return Err(format!(
                    "holds elements of type {other}, and '<f2', '<f4' and '<f8' are read; save it \
                     as array.astype(\"float32\")"
                ));
            }
        };
        if value(text, "fortran_order")? != "False" {
            return Err("is in Fortran order; save it as numpy.ascontiguousarray(array)".into());
        }
        let shape = value(text, "shape")?;
        let sizes = shape.trim_matches(['(', ')']).split(',').map(str::trim);
        let sizes: Result<Vec<usize>, _> =
            (sizes.filter(|s| !s.is_empty()).map(str::parse)).collect();
        let Ok(&[rows, columns]) = sizes.as_deref() else {
            return Err(format!(
                "has the shape {shape}, and a matrix with a row for each vector is read"
            ));
        };
        let expected = (rows.checked_mul(columns))
            .and_then(|n| n.checked_mul(dtype.size()))
            .ok_or("has a shape that no machine can address")?;
        let there = file.len() - data_start;
        if there != expected {
            return Err(format!(
                "has {there} bytes of data where its shape needs {expected}"
            ));
        }
        Ok(Header {
            dtype,
            rows,
            columns,
            data_start,
        })
    }
}

/// The dictionary, and where the data starts.
fn text(file: &[u8]) -> Option<(&[u8], usize)> {
    let rest = file.strip_prefix(MAGIC)?;
    let (len, start): (usize, usize) = match rest.first()? {
        1 => (
            usize::from(u16::from_le_bytes(rest.get(2..4)?.try_into().ok()?)),
            10,
        ),
        _ => (
            u32::from_le_bytes(rest.get(2..6)?.try_into().ok()?) as usize,
            12,
        ),
    };
    Some((file.get(start..start.checked_add(len)?)?, start + len))
}

/// What the dictionary has for a key: a string, a name, or what is in brackets.
fn value<'a>(text: &'a str, key: &str) -> Result<&'a str, String> {
    let missing = || format!("has no {key:?} in its header");
    let (_, rest) = text.split_once(&format!("'{key}'")).ok_or_else(missing)?;
    let rest = rest
        .trim_start()
        .strip_prefix(':')
        .ok_or_else(missing)?
        .trim_start();
    let end = match rest.chars().next() {
        Some('(') => rest.find(')').map(|i| i + 1),
        Some('[') => rest.find(']').map(|i| i + 1),
        _ => rest.find([',', '}']),
    };
    Ok(rest[..end.ok_or_else(missing)?].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, header: &str, data: usize) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.extend([version, 0]);
        match version {
            1 => file.extend((header.len() as u16).to_le_bytes()),
            _ => file.extend((header.len() as u32).to_le_bytes()),
        }
        file.extend(header.as_bytes());
        file.extend(vec![0; data]);
        file
    }

    #[test]
    fn both_versions_are_read() {
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }          \n";
        for version in [1, 2, 3] {
            let file = file(version, text, 24);
            let header = Header::read(&file).unwrap();
            assert_eq!((header.rows, header.columns), (3, 2));
            assert_eq!(header.dtype, DType::F32);
            assert_eq!(header.data_start, file.len() - 24);
            for cut in [3, 8, 11, header.data_start - 1] {
                assert!(Header::read(&file[..cut]).is_err(), "{cut} bytes");
            }
        }
    }

    #[test]
    fn what_is_not_read_is_named() {
        for (header, data, said) in [
            (
                "{'descr': '>f4', 'fortran_order': False, 'shape': (3, 2)}",
                24,
                "'>f4'",
            ),
            (
                "{'descr': '<i8', 'fortran_order': False, 'shape': (3, 2)}",
                48,
                "'<i8'",
            ),
            (
                "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}",
                12,
                "[('a', '<f4')]",
            ),
            (
                "{'descr': '<f4', 'fortran_order': True, 'shape': (3, 2)}",
                24,
                "Fortran",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}",
                12,
                "(3,)",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': ()}",
                4,
                "()",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2, 2)}",
                48,
                "(3, 2, 2)",
            ),
            (
                "{'descr': '<f2', 'fortran_order': False, 'shape': (3, 2)}",
                11,
                "11 bytes",
            ),
            (
                "{'descr': '<f2', 'fortran_order': False, 'shape': (9223372036854775807, 2)}",
                0,
                "address",
            ),
            ("{'descr': '<f2', 'fortran_order': False}", 12, "\"shape\""),
            ("{'descr'", 12, "\"descr\""),
        ] {
            let error = Header::read(&file(1, header, data)).unwrap_err();
            assert!(error.contains(said), "{header}: {error}");
        }
    }
}
