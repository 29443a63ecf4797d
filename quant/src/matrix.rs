//! Quantizes a whole matrix, `[out, in]` in the source to `[in, out]` stored, block by block on all threads.
use crate::plain::Plain;
use crate::strip::{Columns, Findings, Given, LINE, Scheme, Scratch};
use crate::{Pool, QuantError, Source};
use graphs::{DType, Format};
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::Cell;

/// Output channels that one thread quantizes in one go. Fixed, and each block's bytes depend on its rows only.
const BLOCK: usize = 256;

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Payload `[in, out]` and scales of a plain matrix, `given` ones in place of its own. The caller has checked rank, group,
/// parity and how many scales are given.
pub(crate) fn quantize(
    plain: &Plain,
    source: &dyn Source,
    format: Format,
    compute: DType,
    given: Option<&[f32]>,
    pool: &Pool,
) -> Result<(Vec<u8>, Vec<u8>), QuantError> {
    let (out, input) = (plain.rows(), plain.shape.iter().skip(1).product());
    let group = match format {
        Format::Int8 => input,
        Format::Int4 { group } => group,
    };
    let scheme = Scheme {
        input,
        group,
        format,
        scale: compute,
        given: given.map(|scales| Given { scales, outputs: out, first: 0 }),
    };
    let mut payload = pool.take(format.dtype().bytes(input * out));
    let mut scales = pool.take(compute.bytes(format.scale_shape(out, input).iter().product()));
    if payload.is_empty() {
        scales.fill(0);
        return Ok((payload, scales));
    }
    let blocks = out.div_ceil(BLOCK);
    let payloads = split(&mut payload, format.dtype().bytes(out), format.dtype().bytes(BLOCK), blocks);
    let columns = split(&mut scales, compute.bytes(out), compute.bytes(BLOCK), blocks);
    let jobs: Vec<Columns> =
        payloads.into_iter().zip(columns).map(|(payload, scales)| Columns { payload, scales }).collect();
    let findings: Vec<Vec<(usize, Findings)>> = jobs
        .into_par_iter()
        .enumerate()
        .map(|(block, columns)| quantize_block(plain, source, scheme, block * BLOCK, columns))
        .collect::<Result<_, _>>()?;
    check(plain, scheme, findings.into_iter().flatten())?;
    Ok((payload, scales))
}

/// The columns of a matrix with rows of `row` bytes, in blocks of `width` bytes: per block one slice of every row.
fn split(bytes: &mut [u8], row: usize, width: usize, blocks: usize) -> Vec<Vec<&mut [u8]>> {
    let rows = bytes.len() / row;
    let mut columns: Vec<Vec<&mut [u8]>> = (0..blocks).map(|_| Vec::with_capacity(rows)).collect();
    for row in bytes.chunks_exact_mut(row) {
        for (part, column) in row.chunks_mut(width).zip(&mut columns) {
            column.push(part);
        }
    }
    columns
}

fn quantize_block(
    plain: &Plain,
    source: &dyn Source,
    scheme: Scheme<'_>,
    first: usize,
    mut columns: Columns,
) -> Result<Vec<(usize, Findings)>, QuantError> {
    let mut scratch = SCRATCH.take();
    let rows = BLOCK.min(plain.rows() - first);
    let mut findings = Vec::new();
    for at in (0..rows).step_by(LINE * scheme.per_byte()) {
        let count = (LINE * scheme.per_byte()).min(rows - at);
        let bytes = count * plain.row_bytes();
        plain.read(source, first + at, scratch.reserve(bytes))?;
        let given = scheme.given.map(|given| Given { first: first + at, ..given });
        let scheme = Scheme { given, ..scheme };
        let found = match plain.dtype {
            DType::Float16 => scratch.quantize::<f16>(bytes, scheme, at, &mut columns),
            DType::Bfloat16 => scratch.quantize::<bf16>(bytes, scheme, at, &mut columns),
            _ => scratch.quantize::<f32>(bytes, scheme, at, &mut columns),
        };
        findings.push((first + at, found));
    }
    SCRATCH.set(scratch);
    Ok(findings)
}

/// Turns findings, in row order, into the error that the first of them deserves.
fn check(plain: &Plain, scheme: Scheme, findings: impl Iterator<Item = (usize, Findings)>) -> Result<(), QuantError> {
    let (mut count, mut first, mut overflow) = (0, None, None);
    for (start, found) in findings {
        count += found.not_finite;
        first = first.or(found.first.map(|(row, input, value)| (vec![start + row, input], value)));
        overflow =
            overflow.or(found.overflow.map(|(row, group, value)| (vec![start + row, group * scheme.group], value)));
    }
    if let Some((index, value)) = first {
        let (tensor, index) = plain.locate(index);
        return Err(QuantError::NotFinite { tensor, index, value, count });
    }
    if let Some((index, value)) = overflow {
        let (tensor, index) = plain.locate(index);
        return Err(QuantError::ScaleOverflow { tensor, index, value, dtype: scheme.scale });
    }
    Ok(())
}
