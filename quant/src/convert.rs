//! Conversions between the float types, slice by slice.
use graphs::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Values of a float or integer type as f32; integers beyond 2^24 are rounded.
pub fn to_f32(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() * 8 / dtype.bits()];
    widen(dtype, bytes, &mut values);
    values
}

/// Values as the bytes of a float type, rounded to nearest even.
pub fn from_f32(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.bytes(values.len())];
    // What overflows becomes infinite, as on a device.
    let _ = narrow(values, dtype, &mut bytes);
    bytes
}

fn each<const N: usize>(bytes: &[u8], values: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (bytes, value) in bytes.as_chunks::<N>().0.iter().zip(values) {
        *value = convert(*bytes);
    }
}

/// Fills `values` from the bytes of as many elements of `dtype`.
pub(crate) fn widen(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        DType::Float32 => each(bytes, values, f32::from_le_bytes),
        DType::Float16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
            Ok(halves) if halves.len() == values.len() => halves.convert_to_f32_slice(values),
            _ => each(bytes, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
        },
        DType::Bfloat16 => each(bytes, values, |bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)),
        DType::Int32 => each(bytes, values, |bytes| i32::from_le_bytes(bytes) as f32),
        DType::Int64 => each(bytes, values, |bytes| i64::from_le_bytes(bytes) as f32),
        DType::Int8 => each(bytes, values, |bytes| f32::from(i8::from_le_bytes(bytes))),
        DType::Uint8 | DType::Bool => each(bytes, values, |[byte]| f32::from(byte)),
        DType::Int4 => {
            for (at, value) in values.iter_mut().enumerate() {
                let byte = bytes.get(at / 2).copied().unwrap_or_default();
                *value = f32::from((if at % 2 == 0 { byte << 4 } else { byte }) as i8 >> 4);
            }
        }
    }
}

/// Writes `values` as `dtype` (a float type), rounding to nearest even. Returns the first finite value that became infinite.
pub(crate) fn narrow(values: &[f32], dtype: DType, bytes: &mut [u8]) -> Option<usize> {
    match dtype {
        DType::Float16 => {
            match bytemuck::try_cast_slice_mut::<u8, f16>(bytes) {
                Ok(halves) if halves.len() == values.len() => halves.convert_from_f32_slice(values),
                _ => store(values, bytes, |value| f16::from_f32(value).to_le_bytes()),
            }
            // 65520 is halfway between the largest float16 and the next power of two: from there on it rounds to infinity.
            values.iter().position(|value| value.is_finite() && value.abs() >= 65520.0)
        }
        DType::Bfloat16 => {
            store(values, bytes, |value| bf16::from_f32(value).to_le_bytes());
            values.iter().position(|value| value.is_finite() && !bf16::from_f32(*value).is_finite())
        }
        _ => {
            store(values, bytes, f32::to_le_bytes);
            None
        }
    }
}

fn store<const N: usize>(values: &[f32], bytes: &mut [u8], convert: impl Fn(f32) -> [u8; N]) {
    for (bytes, value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *bytes = convert(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_round_trip() {
        for dtype in [DType::Float16, DType::Bfloat16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let values = to_f32(dtype, &bytes);
            let mut again = vec![0; bytes.len()];
            assert_eq!(narrow(&values, dtype, &mut again), None);
            for ((value, old), new) in values.iter().zip(bytes.chunks(2)).zip(again.chunks(2)) {
                assert!(value.is_nan() || old == new);
            }
        }
    }

    #[test]
    fn overflow_is_told() {
        let mut bytes = [0; 8];
        assert_eq!(narrow(&[1.0, -65519.0, f32::INFINITY, 65520.0], DType::Float16, &mut bytes), Some(3));
        assert_eq!(narrow(&[1.0, f32::MAX, 0.0, 0.0], DType::Bfloat16, &mut bytes), Some(1));
        assert_eq!(to_f32(DType::Int4, &[0x8f, 0x70]), [-1.0, -8.0, 0.0, 7.0]);
    }
}
