//! Where kernels put values one after the other.
//!
//! What is read again soon is stored as any numbers are. What no cache would hold
//! until then goes past them, which spares the reading of each line before it is
//! written. That takes whole lines: where values begin in the middle of one, each
//! vector is joined with the end of the one before.

use super::memory::streamed;
use super::{Isa, LANES, Line, Op, dispatch};

/// Takes values in their order.
pub trait Sink<I: Isa> {
    fn push(&mut self, v: I::F);

    /// The first `n` lanes, fewer than all.
    fn push_part(&mut self, v: I::F, n: usize);
}

/// A kernel that gives values one after the other.
pub trait Source {
    fn pour<I: Isa>(self, isa: I, sink: &mut impl Sink<I>);
}

/// Memory for the values of a [`Source`].
pub struct Out<'a> {
    pub values: &'a mut [f32],
    /// Whether they are part of more than caches would hold until someone reads them.
    pub past_caches: bool,
}

impl<'a> Out<'a> {
    /// For values that are soon read.
    pub fn near(values: &'a mut [f32]) -> Out<'a> {
        Out {
            values,
            past_caches: false,
        }
    }

    /// Takes as many values as there is room for.
    pub fn fill(self, source: impl Source) {
        dispatch(Fill { source, out: self });
    }
}

struct Fill<'a, S> {
    source: S,
    out: Out<'a>,
}

impl<S: Source> Op for Fill<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Out {
            values,
            past_caches,
        } = self.out;
        // With two vectors there is one that ends the line in which they begin.
        if I::STREAMS && past_caches && values.len() >= 2 * LANES {
            let mut sink = Streamed::new(isa, values);
            self.source.pour(isa, &mut sink);
            sink.finish();
        } else {
            self.source.pour(isa, &mut Stored::new(isa, values));
        }
    }
}

/// Values given to a sink.
#[inline(always)]
pub fn push_all<I: Isa>(isa: I, x: &[f32], sink: &mut impl Sink<I>) {
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        sink.push(isa.load(chunk));
    }
    if !tail.is_empty() {
        sink.push_part(isa.load_part(tail, 0.0), tail.len());
    }
}

/// Stores values where they belong.
pub struct Stored<'a, I> {
    isa: I,
    rest: &'a mut [f32],
}

impl<'a, I: Isa> Stored<'a, I> {
    #[inline(always)]
    pub fn new(isa: I, rest: &'a mut [f32]) -> Stored<'a, I> {
        Stored { isa, rest }
    }
}

impl<I: Isa> Sink<I> for Stored<'_, I> {
    #[inline(always)]
    fn push(&mut self, v: I::F) {
        let rest = std::mem::take(&mut self.rest);
        if let Some((out, rest)) = rest.split_first_chunk_mut() {
            self.isa.store(v, out);
            self.rest = rest;
        }
    }

    #[inline(always)]
    fn push_part(&mut self, v: I::F, n: usize) {
        let (out, rest) = std::mem::take(&mut self.rest).split_at_mut(n);
        self.isa.store_part(v, out);
        self.rest = rest;
    }
}

/// Streams whole lines; what lies before the first and after the last is stored.
struct Streamed<'a, I: Isa> {
    isa: I,
    head: &'a mut [f32],
    lines: &'a mut [Line],
    tail: &'a mut [f32],
    /// The line that is written next; that of `head` comes before and is kept.
    next: usize,
    first: I::F,
    /// Its last lanes wait for the rest of their line.
    last: I::F,
    /// How many lanes their line lacks, and from where in `last` and the next vector
    /// each of its lanes comes.
    lacks: usize,
    places: I::U,
}

const COUNT: [u8; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

impl<'a, I: Isa> Streamed<'a, I> {
    #[inline(always)]
    fn new(isa: I, values: &'a mut [f32]) -> Streamed<'a, I> {
        let (head, lines, tail) = bytemuck::pod_align_to_mut::<f32, Line>(values);
        let (next, lacks) = match head.len() {
            0 => (0, LANES),
            n => (usize::MAX, n),
        };
        Streamed {
            isa,
            head,
            lines,
            tail,
            next,
            first: isa.splat(0.0),
            last: isa.splat(0.0),
            lacks,
            places: after(isa, lacks),
        }
    }

    /// Writes the next line, whose last lanes are the first of `v`.
    #[inline(always)]
    fn write(&mut self, v: I::F) {
        let line = self.isa.lookup_32([self.last, v], self.places);
        match self.lines.get_mut(self.next) {
            Some(out) => self.isa.stream(line, out),
            None => self.first = line,
        }
        self.next = self.next.wrapping_add(1);
    }

    /// Stores what is no whole line.
    #[inline(always)]
    fn finish(self) {
        let mut lanes = [0f32; LANES];
        self.isa.store(self.first, &mut lanes);
        self.head.copy_from_slice(&lanes[LANES - self.head.len()..]);
        self.isa.store(self.last, &mut lanes);
        self.tail.copy_from_slice(&lanes[self.lacks..]);
        streamed();
    }
}

impl<I: Isa> Sink<I> for Streamed<'_, I> {
    #[inline(always)]
    fn push(&mut self, v: I::F) {
        self.write(v);
        self.last = v;
    }

    #[inline(always)]
    fn push_part(&mut self, v: I::F, n: usize) {
        let enough = n >= self.lacks;
        if enough {
            self.write(v);
        }
        self.last = self.isa.lookup_32([self.last, v], after(self.isa, n));
        self.lacks = self.lacks + if enough { LANES } else { 0 } - n;
        self.places = after(self.isa, self.lacks);
    }
}

/// The places of the sixteen lanes after the first `n` of two vectors.
#[inline(always)]
fn after<I: Isa>(isa: I, n: usize) -> I::U {
    isa.add_u(isa.load_u8(&COUNT), isa.splat_u(n as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{dispatch_at, levels};

    /// Numbers, in pieces of those lengths over and over.
    struct Pieces<'a>(&'a [f32], &'a [usize]);

    impl Source for Pieces<'_> {
        #[inline(always)]
        fn pour<I: Isa>(self, isa: I, sink: &mut impl Sink<I>) {
            let mut x = self.0;
            for &n in self.1.iter().cycle() {
                let (piece, rest) = x.split_at(n.min(x.len()));
                push_all(isa, piece, sink);
                x = rest;
                if x.is_empty() {
                    break;
                }
            }
        }
    }

    #[test]
    fn values_are_where_they_belong_wherever_lines_begin() {
        let x: Vec<f32> = (1..=200u16).map(f32::from).collect();
        let pieces: [&[usize]; 6] = [&[16], &[1], &[7], &[16, 5], &[48, 15, 3], &[200]];
        for level in levels() {
            for past_caches in [false, true] {
                for start in 0..LANES {
                    for len in [1, 15, 16, 31, 32, 33, 64, 79, 200] {
                        for pieces in pieces {
                            let mut lines = [Line([0.0; LANES]); 16];
                            let all: &mut [f32] = bytemuck::cast_slice_mut(&mut lines);
                            let out = Out {
                                values: &mut all[start..start + len],
                                past_caches,
                            };
                            let source = Pieces(&x[..len], pieces);
                            dispatch_at(level, Fill { source, out });
                            assert_eq!(&all[start..start + len], &x[..len]);
                            let around = all[..start].iter().chain(&all[start + len..]);
                            assert!(around.copied().all(|v| v == 0.0), "{level:?} {start} {len}");
                        }
                    }
                }
            }
        }
    }
}
