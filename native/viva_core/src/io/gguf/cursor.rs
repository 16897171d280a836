//! Reads the header's pieces one after the other, never past the end.

/// Bytes of a file, and how far they are read.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Bytes between two positions that were read.
    pub fn between(&self, start: usize, end: usize) -> &'a [u8] {
        &self.bytes[start..end]
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], String> {
        if len > self.left() as u64 {
            return Err(format!(
                "{what} at byte {} takes {len} bytes, but the file ends {} bytes later: it is \
                 truncated or damaged",
                self.at,
                self.left()
            ));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take `least` bytes each, as far as they can fit.
    pub fn count(&mut self, least: usize, what: &str) -> Result<u64, String> {
        let count = self.u64(what)?;
        let room = (self.left() / least) as u64;
        if count > room {
            return Err(format!(
                "{what}: {count}, but what is left of the file has room for {room} at most: it is \
                 truncated or damaged"
            ));
        }
        Ok(count)
    }

    /// A string with its length before it.
    pub fn string(&mut self, what: &str) -> Result<&'a str, String> {
        let len = self.u64(what)?;
        let at = self.at;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|e| {
            format!(
                "{what} at byte {at} is not UTF-8: its byte {}",
                e.valid_up_to()
            )
        })
    }
}
