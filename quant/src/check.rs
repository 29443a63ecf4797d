//! Everything about a weight expression that headers decide: whether it can be stored, and in which type and shape.
use crate::plain::Plain;
use crate::{QuantError, Source};
use graphs::{DType, Format, Weight, group_of_part};

/// Type and shape of a stored weight, and the shape of its scales.
pub(crate) type StoredShapes = (DType, Vec<usize>, Option<Vec<usize>>);

/// How the weight will be stored; no data is read.
pub(crate) fn stored_shapes(weight: &Weight, source: &dyn Source, compute: DType) -> Result<StoredShapes, QuantError> {
    match quantized(weight, source, compute)? {
        Some((format, [out, input])) => Ok((format.dtype(), vec![input, out], Some(format.scale_shape(out, input)))),
        None => {
            let plain = Plain::new(weight, source)?;
            Ok((if plain.dtype.is_float() { compute } else { plain.dtype }, plain.shape, None))
        }
    }
}

/// Format and logical shape of a quantized weight; `None` for a plain one, which is not looked at.
fn quantized(weight: &Weight, source: &dyn Source, compute: DType) -> Result<Option<(Format, [usize; 2])>, QuantError> {
    match weight {
        Weight::Tensor { .. } => Ok(None),
        Weight::Scaled { of, .. } if of.format().is_some() => {
            refuse(weight, "it is quantized before it is scaled".into())
        }
        Weight::Scaled { .. } => Ok(None),
        Weight::Packed { format, scales, of } => {
            let (_, [out, input]) = matrix(weight, *format, of, source, compute)?;
            if let Some(scales) = scales {
                given(weight, scales, &format.scale_shape(out, input), source)?;
            }
            Ok(Some((*format, [out, input])))
        }
        Weight::Slice { axis, start, end, of } => {
            let Some((format, mut shape)) = quantized(of, source, compute)? else { return Ok(None) };
            within(weight, *axis, *start, *end, &shape)?;
            let whole = |step| start.is_multiple_of(step) && end.is_multiple_of(step);
            let (step, cut) = match (axis, format) {
                (0, _) => (8 / format.dtype().bits(), whole(8 / format.dtype().bits()).then_some(format)),
                (_, Format::Int8) => (1, Some(format)),
                (_, Format::Int4 { group }) => {
                    (group, group_of_part(*start, *end, group).map(|group| Format::Int4 { group }))
                }
            };
            let Some(format) = cut else {
                let (axis, start, end) = (*axis, *start, *end);
                return Err(QuantError::SliceStep { weight: weight.key(), axis, start, end, step });
            };
            shape[*axis] = end - start;
            Ok(Some((format, shape)))
        }
        Weight::Concat { axis, parts } => {
            let found: Vec<_> = parts.iter().map(|part| quantized(part, source, compute)).collect::<Result<_, _>>()?;
            let mut quantized = found.iter().flatten();
            let Some((format, first)) = quantized.next() else { return Ok(None) };
            let formats = found.iter().map(|part| part.map(|(format, _)| format));
            if let Some(other) = formats.into_iter().find(|other| *other != Some(*format)) {
                let other = other.map_or("plain".into(), |format| format.to_string());
                return refuse(weight, format!("parts are `{format}` and `{other}`"));
            }
            let shapes: Vec<&[usize]> = found.iter().flatten().map(|(_, shape)| &shape[..]).collect();
            joining(weight, *axis, &shapes)?;
            let mut shape = *first;
            shape[*axis] = shapes.iter().map(|shape| shape[*axis]).sum();
            size(weight, &shape)?;
            Ok(Some((*format, shape)))
        }
    }
}

/// The matrix below a `Packed`, if it can be quantized, and its shape `[out, in]`.
pub(crate) fn matrix<'a>(
    weight: &Weight,
    format: Format,
    of: &'a Weight,
    source: &dyn Source,
    compute: DType,
) -> Result<(Plain<'a>, [usize; 2]), QuantError> {
    let plain = Plain::new(of, source)?;
    let [out, input] = plain.shape[..] else {
        return refuse(weight, format!("shape {:?} is no matrix `[out, in]`", plain.shape));
    };
    if !plain.dtype.is_float() {
        let tensor = of.tensors().first().map(|tensor| tensor.0.to_string()).unwrap_or_default();
        return Err(QuantError::Type { tensor, found: plain.dtype, wanted: "a float type to quantize".into() });
    }
    if !compute.is_float() {
        return refuse(weight, format!("scales of type `{compute}` are not floats"));
    }
    if let Format::Int4 { group } = format {
        if group == 0 || !input.is_multiple_of(group) {
            return Err(QuantError::Group { weight: weight.key(), found: input, group });
        }
        if !out.is_multiple_of(2) {
            return Err(QuantError::OddOutputs { weight: weight.key(), found: out });
        }
    }
    Ok((plain, [out, input]))
}

/// Scales that come with a `Packed`, if they fit.
pub(crate) fn given<'a>(
    weight: &Weight,
    scales: &'a Weight,
    wanted: &[usize],
    source: &dyn Source,
) -> Result<Plain<'a>, QuantError> {
    let plain = Plain::new(scales, source)?;
    match plain.dtype.is_float() && plain.shape == wanted {
        true => Ok(plain),
        false => refuse(weight, format!("its scales are {}{:?}, wanted floats {wanted:?}", plain.dtype, plain.shape)),
    }
}

pub(crate) fn refuse<T>(weight: &Weight, reason: String) -> Result<T, QuantError> {
    Err(QuantError::Expression { weight: weight.key(), reason })
}

/// Refuses a slice beyond its shape.
pub(crate) fn within(
    weight: &Weight,
    axis: usize,
    start: usize,
    end: usize,
    shape: &[usize],
) -> Result<(), QuantError> {
    match shape.get(axis) {
        Some(size) if start <= end && end <= *size => Ok(()),
        _ => refuse(weight, format!("a slice of shape {shape:?} is out of bounds")),
    }
}

/// Refuses parts that differ elsewhere than in the size along `axis`, and no parts.
pub(crate) fn joining(weight: &Weight, axis: usize, shapes: &[&[usize]]) -> Result<(), QuantError> {
    let Some(first) = shapes.first() else { return refuse(weight, "there are no parts".into()) };
    let others = |shape: &[usize]| -> Vec<usize> {
        shape.iter().enumerate().map(|(at, size)| if at == axis { 0 } else { *size }).collect()
    };
    match shapes.iter().find(|shape| axis >= shape.len() || others(shape) != others(first)) {
        Some(other) => refuse(weight, format!("shapes {first:?} and {other:?} do not join along axis {axis}")),
        None => Ok(()),
    }
}

/// Product of a shape, refused where its bytes are no possible size.
pub(crate) fn size(weight: &Weight, shape: &[usize]) -> Result<usize, QuantError> {
    match shape.iter().try_fold(8usize, |product, size| product.checked_mul(*size)) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(bytes / 8),
        _ => refuse(weight, format!("shape {shape:?} is too large")),
    }
}
