//! What terms refer to: resources that own or share native memory.

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, RwLock};

use rustler::env::SavedTerm;
use rustler::{Binary, Env, OwnedBinary, OwnedEnv, Resource, ResourceArc};
use viva_core::Error;
use viva_core::calibration::Calibration;
use viva_core::convert::Conversion;
use viva_core::format::Quantized;
use viva_core::io::{Checkpoint, Matrix, OutputDir, ShardWriter};
use viva_core::method::fold::Observed;
use viva_core::ops::Cancel;
use viva_core::ops::packed::Packed;
use viva_core::tensor::{DType, SharedBytes, Tensor, element_count};
use viva_core::unit::Target;
use viva_core::vectors::{Stored, Writer};

/// A value that can be released before its last reference is gone.
pub struct Slot<T>(RwLock<Option<Arc<T>>>);

impl<T> Slot<T> {
    pub fn new(value: T) -> Slot<T> {
        Slot(RwLock::new(Some(Arc::new(value))))
    }

    /// The value, kept alive while the caller works on it. The lock is held
    /// for the copy of a pointer only.
    pub fn get(&self) -> Result<Arc<T>, Error> {
        let slot = self.0.read().unwrap_or_else(|e| e.into_inner());
        slot.clone().ok_or(Error::Released)
    }

    /// Takes the value out; running calls finish with it.
    pub fn release(&self) -> Option<Arc<T>> {
        let mut slot = self.0.write().unwrap_or_else(|e| e.into_inner());
        slot.take()
    }
}

macro_rules! resources {
    ($($name:ident($inner:ty)),+ $(,)?) => {
        $(
            pub struct $name(pub $inner);

            #[rustler::resource_impl]
            impl Resource for $name {}
        )+
    };
}

resources!(
    TensorResource(Slot<Tensor>),
    QuantizedResource(Slot<Quantized>),
    PackedResource(Slot<Packed>),
    CheckpointResource(Slot<Checkpoint>),
    TargetResource(Target),
    ConversionResource(Conversion),
    OutputResource(std::sync::Mutex<Option<OutputDir>>),
    ShardResource(ShardWriter),
    CalibrationResource(std::sync::Mutex<Calibration>),
    ObservedResource(Observed),
    MatrixResource(Matrix),
    WriterResource(Writer),
    StoredResource(Slot<Stored>),
);

/// A flag that asks native calls to stop, and the count of those that have not
/// returned: a process that is killed leaves its call running.
#[derive(Default)]
pub struct CancelResource {
    cancel: Cancel,
    calls: AtomicUsize,
}

#[rustler::resource_impl]
impl Resource for CancelResource {}

impl CancelResource {
    pub fn cancel(&self) {
        self.cancel.cancel();
        // Before `calls` is asked, as `enter` counts before it looks.
        fence(Ordering::SeqCst);
    }

    /// Counts a call until the guard is dropped. A call that begins after the flag
    /// was raised does nothing, so that none that were counted to zero come back.
    pub fn enter(&self) -> Result<Call<'_>, Error> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let call = Call(self);
        fence(Ordering::SeqCst);
        call.check()?;
        Ok(call)
    }

    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

/// A native call that is under way.
pub struct Call<'a>(&'a CancelResource);

impl Deref for Call<'_> {
    type Target = Cancel;

    fn deref(&self) -> &Cancel {
        &self.0.cancel
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

pub type TensorRef = ResourceArc<TensorResource>;
pub type QuantizedRef = ResourceArc<QuantizedResource>;
pub type PackedRef = ResourceArc<PackedResource>;
pub type CheckpointRef = ResourceArc<CheckpointResource>;
pub type TargetRef = ResourceArc<TargetResource>;
pub type ConversionRef = ResourceArc<ConversionResource>;
pub type OutputRef = ResourceArc<OutputResource>;
pub type ShardRef = ResourceArc<ShardResource>;
pub type MatrixRef = ResourceArc<MatrixResource>;
pub type WriterRef = ResourceArc<WriterResource>;
pub type StoredRef = ResourceArc<StoredResource>;
pub type CancelRef = ResourceArc<CancelResource>;
pub type ObservedRef = ResourceArc<ObservedResource>;
pub type CalibrationRef = ResourceArc<CalibrationResource>;

/// The bytes of a BEAM binary, kept alive by an environment of their own.
pub struct BinaryBytes {
    env: OwnedEnv,
    term: SavedTerm,
    data: *const u8,
    len: usize,
}

// SAFETY: the bytes are immutable and live as long as the environment, which
// belongs to no process; the term is only read after that, by as many threads as like.
unsafe impl Send for BinaryBytes {}
unsafe impl Sync for BinaryBytes {}

impl AsRef<[u8]> for BinaryBytes {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `data` points to `len` bytes of the binary that the
        // environment refers to, and inspecting it has pinned it.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl BinaryBytes {
    /// The bytes of a range as a binary of `env`, without a copy.
    pub fn part<'a>(&self, env: Env<'a>, range: Range<usize>) -> Result<Binary<'a>, Error> {
        let whole = self.env.run(|inner| self.term.load(inner).in_env(env));
        Binary::from_term(whole)
            .and_then(|whole| whole.make_subbinary(range.start, range.len()))
            .map_err(|_| not_a_binary())
    }
}

fn not_a_binary() -> Error {
    Error::InvalidOption {
        option: "binary".into(),
        message: "expected a binary".into(),
    }
}

/// Shares a binary's bytes without a copy.
pub fn share_binary(binary: Binary) -> Result<SharedBytes, Error> {
    let env = OwnedEnv::new();
    let term = env.save(binary);
    let slice = env.run(|inner| {
        let binary = Binary::from_term(term.load(inner))?;
        Ok::<_, rustler::Error>((binary.as_ptr(), binary.len()))
    });
    let (data, len) = slice.map_err(|_| not_a_binary())?;
    Ok(Arc::new(BinaryBytes {
        env,
        term,
        data,
        len,
    }))
}

/// A tensor over a new BEAM binary that `fill` writes. The binary is made in
/// `env`, so that the calling process is charged for its size and collects in
/// time, and then shared.
pub fn tensor_from_binary(
    env: Env,
    dtype: DType,
    shape: Vec<usize>,
    fill: impl FnOnce(&mut [u8]) -> Result<(), Error>,
) -> Result<Tensor, Error> {
    let len = element_count(&shape)? * dtype.size();
    let mut binary = OwnedBinary::new(len);
    fill(binary.as_mut_slice())?;
    Tensor::new(dtype, shape, share_binary(binary.release(env))?, 0..len)
}
