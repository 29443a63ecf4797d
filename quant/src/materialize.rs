//! From weight expressions to bytes. Reads only the rows that a block needs and writes each result once; the bytes
//! are the same for any number of threads.
use crate::plain::Plain;
use crate::{Pool, QuantError, Source, check, convert, matrix, pack};
use graphs::{DType, Format, Weight, group_of_part};
use rayon::prelude::*;

/// A weight as it is stored: plain weights in their logical shape, quantized matrices as `[in, out]` with a scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
    pub scale: Option<Box<Stored>>,
}

impl Stored {
    /// Logical values, of a quantized matrix dequantized as `[out, in]`.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.scale {
            Some(scale) => pack::dequantize(self, scale),
            None => convert::to_f32(self.dtype, &self.bytes),
        }
    }
}

/// Bytes of a plain weight that one thread converts in one go.
const BLOCK: usize = 1 << 20;

/// Makes the bytes of a weight: floats converted to `compute`, integers as they are, quantized matrices packed with
/// scales in `compute`. Besides the result it takes a few MiB per thread, and twice the result where already
/// quantized parts are joined or cut along a scale.
pub fn materialize(weight: &Weight, source: &dyn Source, compute: DType) -> Result<Stored, QuantError> {
    materialize_with(weight, source, compute, &Pool::default())
}

/// [`materialize`] into buffers of earlier results, which is several times faster.
pub fn materialize_with(
    weight: &Weight,
    source: &dyn Source,
    compute: DType,
    pool: &Pool,
) -> Result<Stored, QuantError> {
    check::stored_shapes(weight, source, compute)?;
    make(weight, source, compute, pool)
}

/// [`materialize_with`] for a checked weight.
fn make(weight: &Weight, source: &dyn Source, compute: DType, pool: &Pool) -> Result<Stored, QuantError> {
    match weight {
        Weight::Packed { .. } => quantize(weight, source, compute, pool),
        Weight::Slice { axis, start, end, of } if of.format().is_some() => match narrowed(*axis, *start, *end, of) {
            Some(inner) => make(&inner, source, compute, pool),
            None => pack::slice(weight, &make(of, source, compute, pool)?, *axis, *start, *end),
        },
        Weight::Concat { axis, parts } if weight.format().is_some() => {
            let parts: Vec<_> = parts.iter().map(|part| make(part, source, compute, pool)).collect::<Result<_, _>>()?;
            pack::concat(weight, *axis, &parts)
        }
        _ => convert_plain(weight, source, compute, pool),
    }
}

/// Logical values of a weight as it would be stored for `compute`, in its logical shape.
pub fn materialize_f32(weight: &Weight, source: &dyn Source, compute: DType) -> Result<Vec<f32>, QuantError> {
    Ok(materialize(weight, source, compute)?.to_f32())
}

/// A slice of a quantized matrix as the quantized matrix of a slice, where both are the same: where no scale is cut, or
/// scales are given.
fn narrowed(axis: usize, start: usize, end: usize, of: &Weight) -> Option<Weight> {
    let Weight::Packed { format, scales, of } = of else { return None };
    let cut = |axis, start, end, of: &Weight| Box::new(Weight::Slice { axis, start, end, of: Box::new(of.clone()) });
    let scales = scales.as_deref().map(|scales| match (axis, *format) {
        (0, Format::Int8) => cut(0, start, end, scales),
        (0, Format::Int4 { .. }) => cut(1, start, end, scales),
        (_, Format::Int8) => Box::new(scales.clone()),
        (_, Format::Int4 { group }) => cut(0, start / group, end.div_ceil(group), scales),
    });
    let format = match (axis, *format) {
        (1, Format::Int8) if scales.is_none() => return None,
        (1, Format::Int4 { group }) => match group_of_part(start, end, group)? {
            part if part != group && scales.is_none() => return None,
            group => Format::Int4 { group },
        },
        (_, format) => format,
    };
    Some(Weight::Packed { format, scales, of: cut(axis, start, end, of) })
}

fn quantize(weight: &Weight, source: &dyn Source, compute: DType, pool: &Pool) -> Result<Stored, QuantError> {
    let Weight::Packed { format, scales, of } = weight else {
        return check::refuse(weight, "it is not quantized".into());
    };
    let format = *format;
    let (plain, [out, input]) = check::matrix(weight, format, of, source, compute)?;
    let shape = format.scale_shape(out, input);
    let given = match scales {
        Some(scales) => Some(check::given(weight, scales, &shape, source)?.values(source)?),
        None => None,
    };
    let (bytes, scales) = matrix::quantize(&plain, source, format, compute, given.as_deref(), pool)?;
    let scale = Stored { dtype: compute, shape, bytes: scales, scale: None };
    Ok(Stored { dtype: format.dtype(), shape: vec![input, out], bytes, scale: Some(Box::new(scale)) })
}

fn convert_plain(weight: &Weight, source: &dyn Source, compute: DType, pool: &Pool) -> Result<Stored, QuantError> {
    let plain = Plain::new(weight, source)?;
    let shape = plain.shape.clone();
    let plain = plain.flat();
    let dtype = if plain.dtype.is_float() { compute } else { plain.dtype };
    let row = plain.row_bytes() / plain.dtype.bytes(1);
    let mut bytes = pool.take(dtype.bytes(check::size(weight, &shape)?));
    let rows = (BLOCK / plain.row_bytes().max(1)).max(1);
    bytes.par_chunks_mut((rows * dtype.bytes(row)).max(1)).enumerate().try_for_each(|(block, into)| {
        if dtype == plain.dtype {
            return plain.read(source, block * rows, into);
        }
        let values = into.len() / dtype.bytes(1);
        let mut read = vec![0u8; plain.dtype.bytes(values)];
        plain.read(source, block * rows, &mut read)?;
        let values = convert::to_f32(plain.dtype, &read);
        match convert::narrow(&values, dtype, into) {
            None => Ok(()),
            Some(at) => {
                let index = place(block * rows * row + at, &shape);
                let (tensor, index) = Plain::new(weight, source)?.locate(index);
                Err(QuantError::Overflow { tensor, index, value: values[at], dtype })
            }
        }
    })?;
    Ok(Stored { dtype, shape, bytes, scale: None })
}

/// The index of the element at a place in row-major order.
fn place(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (index, size) in index.iter_mut().zip(shape).rev() {
        (*index, at) = (at % size, at / size);
    }
    index
}
