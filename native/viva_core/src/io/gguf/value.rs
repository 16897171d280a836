//! The values of a GGUF file's metadata.

use super::cursor::Cursor;

/// How deep arrays of arrays may be nested: far past any use, and far from
/// where reading them would exhaust the stack.
const MAX_DEPTH: usize = 8;

macro_rules! scalars {
    ($($id:literal $variant:ident $t:ty),+ $(,)?) => {
        /// The type of a value.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum ValueType {
            $($variant,)+
            Bool,
            String,
            Array,
        }

        /// One value.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value {
            $($variant($t),)+
            Bool(bool),
            String(String),
            Array(Array),
        }

        impl ValueType {
            /// The number that stands in files.
            fn id(self) -> u32 {
                match self {
                    $(ValueType::$variant => $id,)+
                    ValueType::Bool => 7,
                    ValueType::String => 8,
                    ValueType::Array => 9,
                }
            }

            fn from_id(id: u32) -> Option<ValueType> {
                Some(match id {
                    $($id => ValueType::$variant,)+
                    7 => ValueType::Bool,
                    8 => ValueType::String,
                    9 => ValueType::Array,
                    _ => return None,
                })
            }

            /// The fewest bytes that a value takes.
            fn least_bytes(self) -> usize {
                match self {
                    $(ValueType::$variant => size_of::<$t>(),)+
                    ValueType::Bool => 1,
                    ValueType::String => 8,
                    // Its items' type and count.
                    ValueType::Array => 12,
                }
            }

            fn is_fixed_size(self) -> bool {
                !matches!(self, ValueType::Bool | ValueType::String | ValueType::Array)
            }
        }

        impl Value {
            pub fn kind(&self) -> ValueType {
                match self {
                    $(Value::$variant(_) => ValueType::$variant,)+
                    Value::Bool(_) => ValueType::Bool,
                    Value::String(_) => ValueType::String,
                    Value::Array(_) => ValueType::Array,
                }
            }

            /// Appends the bytes of the value, its type not among them.
            fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Value::$variant(v) => out.extend(v.to_le_bytes()),)+
                    Value::Bool(v) => out.push(u8::from(*v)),
                    Value::String(v) => write_string(v, out),
                    Value::Array(v) => {
                        out.extend(v.item.id().to_le_bytes());
                        out.extend((v.len as u64).to_le_bytes());
                        out.extend_from_slice(&v.bytes);
                    }
                }
            }

            fn read(cursor: &mut Cursor, kind: ValueType, depth: usize, what: &str) -> Result<Value, String> {
                Ok(match kind {
                    $(ValueType::$variant => {
                        let mut bytes = [0; size_of::<$t>()];
                        bytes.copy_from_slice(cursor.take(size_of::<$t>() as u64, what)?);
                        Value::$variant(<$t>::from_le_bytes(bytes))
                    })+
                    ValueType::Bool => match cursor.take(1, what)? {
                        [0] => Value::Bool(false),
                        [1] => Value::Bool(true),
                        other => return Err(format!("{what} is a bool of value {}", other[0])),
                    },
                    ValueType::String => Value::String(cursor.string(what)?.into()),
                    ValueType::Array => Value::Array(Array::read(cursor, depth, what)?),
                })
            }
        }

        $(
            impl From<$t> for Value {
                fn from(v: $t) -> Value {
                    Value::$variant(v)
                }
            }
        )+
    };
}

scalars!(
    0 U8 u8,
    1 I8 i8,
    2 U16 u16,
    3 I16 i16,
    4 U32 u32,
    5 I32 i32,
    6 F32 f32,
    10 U64 u64,
    11 I64 i64,
    12 F64 f64,
);

impl From<bool> for Value {
    fn from(v: bool) -> Value {
        Value::Bool(v)
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Value {
        Value::String(v.into())
    }
}

impl From<String> for Value {
    fn from(v: String) -> Value {
        Value::String(v)
    }
}

impl From<Array> for Value {
    fn from(v: Array) -> Value {
        Value::Array(v)
    }
}

impl Value {
    /// A whole number of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A number of any width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            Value::I8(v) => Some(v.into()),
            Value::I16(v) => Some(v.into()),
            Value::I32(v) => Some(v.into()),
            Value::I64(v) => Some(v as f64),
            _ => self.as_u64().map(|v| v as f64),
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(v) => Some(v),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(v) => Some(v),
            _ => None,
        }
    }
}

fn write_string(v: &str, out: &mut Vec<u8>) {
    out.extend((v.len() as u64).to_le_bytes());
    out.extend_from_slice(v.as_bytes());
}

/// Items of one type, kept as they stand in the file: a vocabulary of 100,000
/// strings takes no more memory than it takes there.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    item: ValueType,
    len: usize,
    bytes: Vec<u8>,
}

impl Array {
    /// An array of these items; `None` when they are not all of the type `item`.
    pub fn new(item: ValueType, items: impl IntoIterator<Item = Value>) -> Option<Array> {
        let mut array = Array {
            item,
            len: 0,
            bytes: Vec::new(),
        };
        for value in items {
            if value.kind() != item {
                return None;
            }
            value.write(&mut array.bytes);
            array.len += 1;
        }
        Some(array)
    }

    /// An array of strings.
    pub fn strings<'a>(items: impl IntoIterator<Item = &'a str>) -> Array {
        let mut array = Array {
            item: ValueType::String,
            len: 0,
            bytes: Vec::new(),
        };
        for text in items {
            write_string(text, &mut array.bytes);
            array.len += 1;
        }
        array
    }

    /// The type of its items.
    pub fn item(&self) -> ValueType {
        self.item
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The items, each made when it is asked for.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        let mut cursor = Cursor::new(&self.bytes);
        // All of it was read once, or written here: there is nothing to fail.
        (0..self.len).map_while(move |_| Value::read(&mut cursor, self.item, 0, "an item").ok())
    }

    /// Walks over every item, so that later nothing can be found wrong, and
    /// copies the bytes.
    fn read(cursor: &mut Cursor, depth: usize, what: &str) -> Result<Array, String> {
        let item = read_type(cursor, what)?;
        let len = cursor.count(item.least_bytes(), &format!("the length of {what}"))?;
        let start = cursor.at();
        skip(cursor, item, len, depth + 1, what)?;
        Ok(Array {
            item,
            len: len as usize,
            bytes: cursor.between(start, cursor.at()).to_vec(),
        })
    }
}

fn read_type(cursor: &mut Cursor, what: &str) -> Result<ValueType, String> {
    let id = cursor.u32(what)?;
    ValueType::from_id(id).ok_or_else(|| format!("{what} has the unknown type {id}"))
}

/// Checks `len` items and leaves them behind.
fn skip(
    cursor: &mut Cursor,
    item: ValueType,
    len: u64,
    depth: usize,
    what: &str,
) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("{what} has arrays in arrays, {depth} deep"));
    }
    if item.is_fixed_size() {
        // No overflow: the count was compared with the bytes that are left.
        cursor.take(len * item.least_bytes() as u64, what)?;
        return Ok(());
    }
    for _ in 0..len {
        match item {
            ValueType::Array => {
                let item = read_type(cursor, what)?;
                let len = cursor.count(item.least_bytes(), what)?;
                skip(cursor, item, len, depth + 1, what)?;
            }
            ValueType::String => {
                cursor.string(what)?;
            }
            _ => {
                Value::read(cursor, item, depth, what)?;
            }
        }
    }
    Ok(())
}

/// Keys and values, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    pairs: Vec<(String, Value)>,
}

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// Sets the value of a key, in its old place if it is there.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.pairs.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => self.pairs.push((key, value)),
        }
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Reads `count` pairs.
    pub(super) fn read(cursor: &mut Cursor, count: u64) -> Result<Metadata, String> {
        let mut seen = std::collections::HashSet::new();
        let mut pairs = Vec::new();
        for i in 0..count {
            let key = cursor.string(&format!("key {i} of the metadata"))?;
            if key.is_empty() {
                return Err(format!("key {i} of the metadata is empty"));
            }
            if !seen.insert(key) {
                return Err(format!("the metadata has the key {key:?} twice"));
            }
            let what = format!("the value of {key:?}");
            let kind = read_type(cursor, &what)?;
            pairs.push((key.into(), Value::read(cursor, kind, 0, &what)?));
        }
        Ok(Metadata { pairs })
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        for (key, value) in &self.pairs {
            write_string(key, out);
            out.extend(value.kind().id().to_le_bytes());
            value.write(out);
        }
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Metadata {
        let mut metadata = Metadata::default();
        for (key, value) in pairs {
            metadata.set(key, value);
        }
        metadata
    }
}
