//! The hot loop: a strip of rows `[out, in]` is quantized tile by tile and leaves transposed, as columns of `[in, out]`.
use crate::round::{Element, absmax, given_scale, quantize, quantize_clipped, scale};
use graphs::{DType, Format};
use half::{bf16, f16};
use std::ops::Range;

/// Bytes of a stored row that one strip fills: a cache line. A strip has so many rows of int8, twice as many of int4.
pub(crate) const LINE: usize = 64;
/// Inputs that are quantized before they are transposed. Measured: longer runs pay for the tile leaving the first cache.
const TILE: usize = 512;

/// Scales that are not the weights' own, `[groups, outputs]`.
#[derive(Clone, Copy)]
pub(crate) struct Given<'g> {
    pub(crate) scales: &'g [f32],
    pub(crate) outputs: usize,
    /// The output that a strip's first row is.
    pub(crate) first: usize,
}

/// How a matrix is quantized.
#[derive(Clone, Copy)]
pub(crate) struct Scheme<'g> {
    pub(crate) input: usize,
    /// Consecutive inputs under one scale; all of them for int8.
    pub(crate) group: usize,
    pub(crate) format: Format,
    /// Type of the stored scales.
    pub(crate) scale: DType,
    pub(crate) given: Option<Given<'g>>,
}

impl Scheme<'_> {
    /// Output channels in one stored byte.
    pub(crate) fn per_byte(&self) -> usize {
        8 / self.format.dtype().bits()
    }

    pub(crate) fn groups(&self) -> usize {
        self.input / self.group
    }
}

/// The columns of the stored matrix and of its scales that one thread fills: one slice per input and per group.
pub(crate) struct Columns<'o> {
    pub(crate) payload: Vec<&'o mut [u8]>,
    pub(crate) scales: Vec<&'o mut [u8]>,
}

/// What a strip met: rows count from the strip's first.
#[derive(Default)]
pub(crate) struct Findings {
    /// Values that are NaN or infinite.
    pub(crate) not_finite: usize,
    /// The first of them: row, input, value.
    pub(crate) first: Option<(usize, usize, f32)>,
    /// The first scale beyond its type: row, group, value.
    pub(crate) overflow: Option<(usize, usize, f32)>,
}

/// Memory of one thread, kept between strips.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Bytes of the rows, aligned for every element type.
    pub(crate) rows: Vec<u64>,
    scales: Vec<f32>,
    tile: Vec<u8>,
    turned: Vec<u8>,
}

/// One strip's work: the rows in `values`, the first of which is row `at` of `columns`.
struct Strip<'s, 'o, E> {
    values: &'s [E],
    scheme: Scheme<'s>,
    at: usize,
    columns: &'s mut Columns<'o>,
    scales: &'s mut Vec<f32>,
    tile: &'s mut Vec<u8>,
    turned: &'s mut Vec<u8>,
}

impl<E: Element> pulp::WithSimd for Strip<'_, '_, E> {
    type Output = Findings;

    /// Compiled once per instruction set; whatever is inlined here is vectorized for it.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Findings {
        quantize_strip(self)
    }
}

#[inline(always)]
fn quantize_strip<E: Element>(strip: Strip<E>) -> Findings {
    let Strip { values, scheme, at, columns, scales, tile, turned } = strip;
    let Scheme { input, group, .. } = scheme;
    let (rows, groups, limit) = (values.len() / input, scheme.groups(), scheme.format.limit());
    let mut findings = Findings::default();
    scales.clear();
    for (row, values) in values.chunks_exact(input).enumerate() {
        for (index, values) in values.chunks_exact(group).enumerate() {
            let most = absmax(values);
            if most >= E::INFINITE {
                count_not_finite(values, row, index * group, &mut findings);
                scales.push(1.0);
                continue;
            }
            let wanted = match scheme.given {
                Some(given) => given.scales[index * given.outputs + given.first + row],
                None => E::from_magnitude(most) / limit,
            };
            let scale = match scheme.given {
                Some(_) => given_scale(wanted, scheme.scale),
                None => scale(E::from_magnitude(most), limit, scheme.scale),
            };
            if !scale.is_finite() && findings.overflow.is_none() {
                findings.overflow = Some((row, index, wanted));
            }
            scales.push(scale);
        }
    }
    store_scales(scales, groups, scheme.scale, at, &mut columns.scales);

    let per_byte = scheme.per_byte();
    let (begin, bytes) = (at / per_byte, rows / per_byte);
    // Lanes beyond the strip's rows keep what an earlier strip left there; they are never stored.
    tile.resize(LINE * TILE, 0);
    turned.resize(LINE * TILE, 0);
    for first in (0..input).step_by(TILE) {
        let last = input.min(first + TILE);
        if per_byte == 1 {
            for (row, into) in tile.chunks_exact_mut(TILE).take(bytes).enumerate() {
                quantize_run(values, scales, scheme, row, first..last, into);
            }
        } else {
            let mut high = [0u8; TILE];
            for (pair, into) in tile.chunks_exact_mut(TILE).take(bytes).enumerate() {
                quantize_run(values, scales, scheme, 2 * pair, first..last, into);
                quantize_run(values, scales, scheme, 2 * pair + 1, first..last, &mut high);
                for (low, high) in into.iter_mut().zip(&high) {
                    *low = *low & 15 | *high << 4;
                }
            }
        }
        transpose(tile, turned, &mut columns.payload[first..last], begin, bytes);
    }
    findings
}

/// Quantizes the inputs `run` of one row.
#[inline(always)]
fn quantize_run<E: Element>(
    values: &[E],
    scales: &[f32],
    scheme: Scheme<'_>,
    row: usize,
    run: Range<usize>,
    into: &mut [u8],
) {
    let values = &values[row * scheme.input..(row + 1) * scheme.input];
    let scales = &scales[row * scheme.groups()..(row + 1) * scheme.groups()];
    let mut start = run.start;
    for (index, scale) in scales.iter().enumerate().skip(run.start / scheme.group) {
        let end = run.end.min((index + 1) * scheme.group);
        let (values, limit, into) = (&values[start..end], scheme.format.limit(), &mut into[start - run.start..]);
        match scheme.given {
            Some(_) => quantize_clipped(values, *scale, limit, into),
            None => quantize(values, *scale, scheme.scale, limit, into),
        }
        start = end;
        if start == run.end {
            break;
        }
    }
}

/// Stores the tile's columns as rows: `bytes` bytes from `begin` on in each slice of `into`.
#[inline(always)]
fn transpose(tile: &[u8], turned: &mut [u8], into: &mut [&mut [u8]], begin: usize, bytes: usize) {
    let (turned, _) = turned.as_chunks_mut::<LINE>();
    for (group, rows) in tile.chunks_exact(8 * TILE).enumerate() {
        for first in (0..into.len()).step_by(8) {
            // 8 columns of 8 rows.
            let mut words = [0u64; 8];
            for (word, row) in words.iter_mut().zip(rows.chunks_exact(TILE)) {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&row[first..first + 8]);
                *word = u64::from_le_bytes(bytes);
            }
            // Transposed in three rounds of swaps.
            swap::<4>(&mut words, 0x0000_0000_ffff_ffff);
            swap::<2>(&mut words, 0x0000_ffff_0000_ffff);
            swap::<1>(&mut words, 0x00ff_00ff_00ff_00ff);
            for (word, line) in words.iter().zip(&mut turned[first..first + 8]) {
                line[8 * group..8 * group + 8].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
    if bytes == LINE {
        for (line, into) in turned.iter().zip(into) {
            into[begin..begin + LINE].copy_from_slice(line);
        }
    } else {
        for (line, into) in turned.iter().zip(into) {
            into[begin..begin + bytes].copy_from_slice(&line[..bytes]);
        }
    }
}

/// Swaps the bytes outside `mask` of each row with those inside of the row `STEP` further.
#[inline(always)]
fn swap<const STEP: usize>(rows: &mut [u64; 8], mask: u64) {
    for row in [0, 1, 2, 3, 4, 5, 6, 7] {
        if row & STEP == 0 {
            let (low, high) = (rows[row], rows[row + STEP]);
            let swap = (low >> (8 * STEP) ^ high) & mask;
            rows[row + STEP] = high ^ swap;
            rows[row] = low ^ swap << (8 * STEP);
        }
    }
}

fn store_scales(scales: &[f32], groups: usize, dtype: DType, at: usize, columns: &mut [&mut [u8]]) {
    for (row, scales) in scales.chunks_exact(groups).enumerate() {
        for (scale, column) in scales.iter().zip(columns.iter_mut()) {
            match dtype {
                DType::Float16 => put(column, at + row, f16::from_f32(*scale).to_le_bytes()),
                DType::Bfloat16 => put(column, at + row, bf16::from_f32(*scale).to_le_bytes()),
                _ => put(column, at + row, scale.to_le_bytes()),
            }
        }
    }
}

fn put<const N: usize>(column: &mut [u8], at: usize, bytes: [u8; N]) {
    column[at * N..(at + 1) * N].copy_from_slice(&bytes);
}

#[cold]
fn count_not_finite<E: Element>(values: &[E], row: usize, input: usize, findings: &mut Findings) {
    for (at, value) in values.iter().enumerate().filter(|(_, value)| value.magnitude() >= E::INFINITE) {
        findings.not_finite += 1;
        findings.first.get_or_insert((row, input + at, value.value()));
    }
}

impl Scratch {
    /// The buffer for `bytes` bytes of rows.
    pub(crate) fn reserve(&mut self, bytes: usize) -> &mut [u8] {
        self.rows.resize(bytes.div_ceil(8).max(self.rows.len()), 0);
        &mut bytemuck::cast_slice_mut(&mut self.rows)[..bytes]
    }

    /// Quantizes the first `bytes` bytes of the rows with the instructions that the machine has.
    pub(crate) fn quantize<E: Element>(
        &mut self,
        bytes: usize,
        scheme: Scheme<'_>,
        at: usize,
        columns: &mut Columns,
    ) -> Findings {
        let values: &[E] = bytemuck::cast_slice(&bytemuck::cast_slice::<u64, u8>(&self.rows)[..bytes]);
        let (scales, tile, turned) = (&mut self.scales, &mut self.tile, &mut self.turned);
        pulp::Arch::new().dispatch(Strip { values, scheme, at, columns, scales, tile, turned })
    }
}
