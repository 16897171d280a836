//! A whole checkpoint in another layout: what becomes of each tensor, and the
//! work of one of them.
//!
//! What is quantized goes where the target has a place for it, and to floats
//! where it has none; what is not quantized stays so.

mod files;
mod work;

use std::collections::{BTreeMap, HashMap};

use crate::content::{self, Read};
use crate::error::{Error, Result};
use crate::format::{Granularity, Spec};
use crate::io::{Checkpoint, Entry, EntryDType, FixedEntry, ShardFile, ShardWriter};
use crate::layout::gguf::{self, ROPE_FACTORS};
use crate::layout::{self, Entries, Found, Layout, WholeFile};
use crate::tensor::DType;
use crate::transcode;

pub use self::files::{SIDECARS, TextFile};
pub use self::work::Done;

/// Where a checkpoint is going.
#[derive(Clone, Copy)]
pub enum Goal {
    Layout(&'static dyn Layout),
    /// Floats in safetensors files, as models are published.
    Plain,
}

/// The name by which users ask for floats.
pub const PLAIN: &str = "plain";

impl Goal {
    pub fn by_name(name: &str) -> Result<Goal> {
        match (name, layout::layout(name)) {
            (PLAIN, _) => Ok(Goal::Plain),
            (_, Ok(layout)) => Ok(Goal::Layout(layout)),
            (_, Err(Error::UnknownLayout { name, known })) => Err(Error::UnknownLayout {
                name,
                known: format!("{known}, {PLAIN}"),
            }),
            (_, Err(e)) => Err(e),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Goal::Layout(layout) => layout.name(),
            Goal::Plain => PLAIN,
        }
    }

    fn layout(self) -> Option<&'static dyn Layout> {
        match self {
            Goal::Layout(layout) => Some(layout),
            Goal::Plain => None,
        }
    }

    pub fn whole_file(self) -> Option<&'static dyn WholeFile> {
        self.layout()?.whole_file()
    }
}

/// What becomes of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Becomes {
    Quantized(Spec),
    Dense(DType),
    /// The same bytes.
    Kept,
    /// Nothing: the rest of the target implies it.
    Implied,
}

/// One logical tensor: the parts of a quantized weight count as one.
pub struct Piece {
    /// Its name in the target, before a layout spells it.
    pub name: String,
    /// Its format, or dtype, and the layout of a quantized one.
    pub format: String,
    pub layout: Option<&'static str>,
    pub shape: Vec<usize>,
    pub becomes: Becomes,
    /// The tensors of the source that spell it.
    tensors: Vec<String>,
    found: Option<Found>,
    /// The dtype of its values, told by the source.
    dtype: EntryDType,
    pub input_bytes: usize,
}

impl Piece {
    pub fn is_quantized(&self) -> bool {
        self.layout.is_some()
    }

    fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or("", |(module, _)| module)
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn read(&self, source: &Checkpoint) -> Result<Read> {
        match &self.found {
            Some(found) => content::read_found(source, found).map(Read::Quantized),
            None => content::read_single(source, &self.name),
        }
    }

    fn give_back(&self, source: &Checkpoint) -> Result<()> {
        self.tensors.iter().try_for_each(|t| source.give_back(t))
    }

    /// As an entry of a file of floats.
    fn entry(&self, dtype: EntryDType) -> Entry {
        Entry {
            name: self.name.clone(),
            dtype,
            shape: self.shape.clone(),
            range: 0..0,
        }
    }
}

/// The plan of a whole checkpoint.
pub struct Conversion {
    pub goal: Goal,
    dtype: Option<DType>,
    pub pieces: Vec<Piece>,
    by_name: HashMap<String, usize>,
}

impl Conversion {
    /// Decides for every tensor. With a `dtype`, floats are cast to it, and to f32
    /// where they would be of several dtypes and loaders would leave them so;
    /// `outer` are modules that are embeddings or output heads, in the
    /// source's names.
    ///
    /// # Errors
    /// `InvalidFile` when a quantized tensor of the source cannot be read, or
    /// the target has no place for a tensor or for what the model is.
    pub fn plan(
        source: &Checkpoint,
        goal: Goal,
        dtype: Option<DType>,
        outer: &[String],
    ) -> Result<Conversion> {
        // The vectors of a GGUF file are in f32, whatever its matrices are in.
        let mixed = source.gguf_metadata().is_some();
        let alone = goal.layout().is_some_and(|l| l.leaves_floats());
        let dtype = dtype.or((mixed && alone).then_some(DType::F32));
        match goal.whole_file() {
            Some(whole) => {
                whole.metadata(source, None)?;
                whole.more(source)?;
            }
            None => {
                if let Ok(factors) = source.entry(ROPE_FACTORS) {
                    check_rope(source, factors)?;
                }
            }
        }
        let mut conversion = Conversion {
            goal,
            dtype,
            pieces: pieces(source, goal)?,
            by_name: HashMap::new(),
        };
        for piece in &mut conversion.pieces {
            let is_outer = piece.tensors.iter().any(|tensor| {
                let module = tensor.rsplit_once('.').map_or("", |(module, _)| module);
                outer.iter().any(|o| o == module)
            });
            piece.becomes = becomes(source, goal, dtype, piece, is_outer)?;
        }
        if let Some(layout) = goal.layout().filter(|l| l.one_for_all()) {
            conversion.agree(source, layout)?;
        }
        for (i, piece) in conversion.pieces.iter().enumerate() {
            conversion.by_name.insert(piece.name.clone(), i);
            conversion.entries(source, piece)?;
        }
        Ok(conversion)
    }

    /// Gives every weight that was not in this layout already the format of most
    /// of them and the shortest of their blocks.
    fn agree(&mut self, source: &Checkpoint, layout: &'static dyn Layout) -> Result<()> {
        let Some(most) = self.specs().first().map(|(spec, _)| (*spec).clone()) else {
            return Ok(());
        };
        let own = |piece: &Piece| piece.layout == Some(layout.name());
        let blocks = self.pieces.iter().filter_map(|p| match &p.becomes {
            Becomes::Quantized(spec) if spec.format == most.format => match spec.granularity {
                Granularity::Block(n) => Some(n),
                _ => p.shape.last().copied(),
            },
            _ => None,
        });
        let block = blocks.reduce(greatest_common_divisor);
        let agreed = match (most.granularity, block) {
            (Granularity::Block(_), Some(n)) => Spec {
                granularity: Granularity::Block(n),
                ..most
            },
            _ => most,
        };
        // Whether there are zero points is no matter of the config.
        let agrees =
            |spec: &Spec| (&spec.format, spec.granularity) == (&agreed.format, agreed.granularity);
        let same = |p: &Piece| matches!(&p.becomes, Becomes::Quantized(s) if agrees(s));
        if self
            .pieces
            .iter()
            .all(|p| !p.is_quantized() || own(p) || same(p))
        {
            return Ok(());
        }
        for piece in &mut self.pieces {
            if let Becomes::Quantized(spec) = &mut piece.becomes {
                *spec = Spec {
                    symmetric: match spec.format == agreed.format {
                        true => spec.symmetric,
                        false => agreed.symmetric,
                    },
                    ..agreed.clone()
                };
                let dtype = float_dtype(source, self.dtype, piece.dtype);
                let held = layout.entries(spec, &piece.name, &piece.shape, dtype);
                if held.is_err() {
                    piece.becomes = Becomes::Dense(dtype);
                }
            }
        }
        Ok(())
    }

    /// The specs of the target and the elements under each, the most first.
    fn specs(&self) -> Vec<(&Spec, usize)> {
        let mut specs: Vec<(&Spec, usize)> = Vec::new();
        for piece in &self.pieces {
            if let Becomes::Quantized(spec) = &piece.becomes {
                match specs.iter_mut().find(|(s, _)| alike(s, spec)) {
                    Some((_, elements)) => *elements += piece.elements(),
                    None => specs.push((spec, piece.elements())),
                }
            }
        }
        specs.sort_by_key(|(_, elements)| std::cmp::Reverse(*elements));
        specs
    }

    pub fn piece(&self, name: &str) -> Result<&Piece> {
        let at = self.by_name.get(name).ok_or_else(|| Error::UnknownTensor {
            name: name.into(),
            hint: String::new(),
        })?;
        Ok(&self.pieces[*at])
    }

    /// What a tensor adds to a file.
    pub fn entries(&self, source: &Checkpoint, piece: &Piece) -> Result<Entries> {
        let mut entries = Entries::default();
        match (&piece.becomes, self.goal.layout()) {
            (Becomes::Quantized(spec), Some(layout)) => {
                let dtype = float_dtype(source, None, piece.dtype);
                return layout.entries(spec, &piece.name, &piece.shape, dtype);
            }
            (Becomes::Implied, _) | (Becomes::Quantized(_), None) => {}
            (becomes, _) => {
                let dtype = match becomes {
                    Becomes::Dense(dtype) => EntryDType::Known(*dtype),
                    _ => piece.dtype,
                };
                entries.fixed.extend(self.stored(source, piece, dtype)?);
            }
        }
        Ok(entries)
    }

    /// A dense tensor as the target stores it.
    fn stored(
        &self,
        source: &Checkpoint,
        piece: &Piece,
        dtype: EntryDType,
    ) -> Result<Option<FixedEntry>> {
        let entry = piece.entry(dtype);
        match self.goal.whole_file() {
            Some(whole) => whole.kept(source, &entry),
            None => Ok(Some(FixedEntry {
                name: entry.name,
                dtype,
                shape: entry.shape,
            })),
        }
    }

    /// Starts a shard for the tensors of these names.
    pub fn create_shard(
        &self,
        at: impl Into<ShardFile>,
        source: &Checkpoint,
        names: &[String],
        metadata: BTreeMap<String, String>,
    ) -> Result<ShardWriter> {
        let mut all = Entries::default();
        for name in names {
            let entries = self.entries(source, self.piece(name)?)?;
            all.fixed.extend(entries.fixed);
            all.late.extend(entries.late);
        }
        let Some(whole) = self.goal.whole_file() else {
            return ShardWriter::create(at, all.fixed, all.late, metadata);
        };
        let spec = self.specs().first().map(|(spec, _)| *spec);
        let metadata = whole.metadata(source, spec)?;
        let more = whole.more(source)?;
        all.fixed
            .extend(more.iter().map(|(entry, _)| entry.clone()));
        let shard = ShardWriter::create(at, all.fixed, all.late, metadata)?;
        for (entry, bytes) in more {
            shard.write(&entry.name, &bytes)?;
        }
        Ok(shard)
    }
}

/// Whether two specs are the same to a program that loads them: how codes were
/// chosen is not told.
fn alike(a: &Spec, b: &Spec) -> bool {
    let method = a.method;
    *a == Spec {
        method,
        ..b.clone()
    }
}

/// Outside of a GGUF file the factors are not a tensor but follow from the
/// configuration: it has to give them again.
fn check_rope(source: &Checkpoint, entry: &Entry) -> Result<()> {
    if gguf::rope_is_told(source, &source.tensor(&entry.name)?) {
        return Ok(());
    }
    Err(Error::InvalidFile {
        path: source.path().display().to_string(),
        message: format!(
            "its {ROPE_FACTORS} are no factors of llama3's scaling, which config.json could say; \
             convert it to gguf only"
        ),
    })
}

/// The logical tensors of a checkpoint, in the order of its files.
fn pieces(source: &Checkpoint, goal: Goal) -> Result<Vec<Piece>> {
    let names: Vec<&str> = source.entries().map(|e| e.name.as_str()).collect();
    let found = layout::find(&names);
    let part_of: HashMap<&str, usize> = found
        .iter()
        .enumerate()
        .flat_map(|(i, f)| f.tensors.iter().map(move |t| (t.as_str(), i)))
        .collect();
    let mut told = vec![false; found.len()];
    let mut pieces = Vec::new();
    for entry in source.entries() {
        if gguf::scaled_weight(source, entry).is_some() {
            continue;
        }
        let found = match part_of.get(entry.name.as_str()) {
            Some(&i) if std::mem::replace(&mut told[i], true) => continue,
            Some(&i) => Some(found[i].clone()),
            None => None,
        };
        let keeps_name = goal.whole_file().is_some();
        let theirs = || gguf::renamed(source, &entry.name).filter(|_| !keeps_name);
        let (name, tensors) = match &found {
            Some(f) => (f.name.clone(), f.tensors.clone()),
            None => {
                let name = theirs().unwrap_or_else(|| entry.name.clone());
                let beside = gguf::weight_scale(source, entry);
                let all = std::iter::once(entry).chain(beside);
                (name, all.map(|e| e.name.clone()).collect())
            }
        };
        let sizes = tensors.iter().map(|t| Ok(source.entry(t)?.nbytes()));
        let layout = match (&found, entry.dtype) {
            (Some(f), _) => Some(layout::layout(f.layout)?.name()),
            (None, EntryDType::Ggml(_)) => Some("gguf"),
            _ => None,
        };
        pieces.push(Piece {
            name,
            format: entry.dtype.name(),
            layout,
            shape: entry.shape.clone(),
            becomes: Becomes::Kept,
            input_bytes: sizes.sum::<Result<usize>>()?,
            tensors,
            found,
            dtype: entry.dtype,
        });
    }
    Ok(pieces)
}

/// What becomes of a tensor; tells a quantized one's format and shape by the way.
fn becomes(
    source: &Checkpoint,
    goal: Goal,
    dtype: Option<DType>,
    piece: &mut Piece,
    is_outer: bool,
) -> Result<Becomes> {
    if piece.is_quantized() {
        let Read::Quantized(q) = piece.read(source)? else {
            return Ok(Becomes::Kept);
        };
        piece.format.clone_from(&q.spec.format);
        piece.shape.clone_from(&q.shape);
        piece.dtype = EntryDType::Known(q.dtype);
        let layout = goal.layout().filter(|l| l.holds_embeddings() || !is_outer);
        let spec = match layout {
            Some(layout) => transcode::choose(&q, layout, &piece.name)?,
            None => None,
        };
        drop(q);
        piece.give_back(source)?;
        let dense = || Becomes::Dense(float_dtype(source, dtype, piece.dtype));
        return Ok(spec.map_or_else(dense, Becomes::Quantized));
    }
    if piece.name == ROPE_FACTORS && goal.whole_file().is_none() {
        return Ok(Becomes::Implied);
    }
    let wanted = match (piece.dtype, dtype) {
        (EntryDType::Known(DType::F8E8M0), _) => None,
        (EntryDType::Known(from), Some(dtype)) if from.is_float() => Some(dtype),
        _ => None,
    };
    let dtype = wanted.map_or(piece.dtype, EntryDType::Known);
    let stored = match goal.whole_file() {
        None => dtype,
        Some(whole) => match whole.kept(source, &piece.entry(dtype))? {
            None => return Ok(Becomes::Implied),
            Some(entry) => entry.dtype,
        },
    };
    Ok(match stored {
        EntryDType::Known(dtype) if stored != piece.dtype => Becomes::Dense(dtype),
        _ => Becomes::Kept,
    })
}

/// The dtype of floats made of a weight: the one asked for, that of the model,
/// or that which the weight was quantized from.
fn float_dtype(source: &Checkpoint, asked: Option<DType>, own: EntryDType) -> DType {
    let model = source.config().and_then(layout::model_dtype);
    match (asked.or(model), own) {
        (Some(dtype), _) => dtype,
        (None, EntryDType::Known(own)) => own,
        (None, _) => DType::F32,
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => greatest_common_divisor(b, a % b),
    }
}
