//! Values of the interpreter.
use crate::DType;
use half::{bf16, f16};

/// A row-major array.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Data,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    Float(Vec<f32>),
    Int(Vec<i32>),
}

/// Mantissa bits of a float32 that the last bits of sums leave alone, of 23: engines were seen to differ by 3e-7 to 6e-7.
const STEADY_BITS: u32 = 19;

/// A float rounded to [`STEADY_BITS`].
fn shortened(value: f32) -> f32 {
    let lost = f32::MANTISSA_DIGITS - 1 - STEADY_BITS;
    let half = 1 << (lost - 1);
    if value.is_finite() { f32::from_bits((value.to_bits() + half) & !((1 << lost) - 1)) } else { value }
}

impl Array {
    pub fn float(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Array {
        Array { shape: shape.into(), data: Data::Float(data) }
    }

    pub fn int(shape: impl Into<Vec<usize>>, data: Vec<i32>) -> Array {
        Array { shape: shape.into(), data: Data::Int(data) }
    }

    /// With values as `dtype` holds them; float32 with as many bits as are left where sums come in another order.
    pub(super) fn rounded(mut self, dtype: DType) -> Array {
        if let Data::Float(data) = &mut self.data {
            match dtype {
                DType::Float16 => data.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
                DType::Bfloat16 => data.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
                DType::Float32 => data.iter_mut().for_each(|value| *value = shortened(*value)),
                _ => {}
            }
        }
        self
    }

    pub fn len(&self) -> usize {
        match &self.data {
            Data::Float(data) => data.len(),
            Data::Int(data) => data.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// # Errors
    /// Where the array holds integers.
    pub fn floats(&self) -> Result<&[f32], String> {
        match &self.data {
            Data::Float(data) => Ok(data),
            Data::Int(_) => Err("wanted floats, found integers".into()),
        }
    }

    /// # Errors
    /// Where the array holds floats.
    pub fn ints(&self) -> Result<&[i32], String> {
        match &self.data {
            Data::Int(data) => Ok(data),
            Data::Float(_) => Err("wanted integers, found floats".into()),
        }
    }

    /// Size of the last dimension.
    pub(super) fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float32_keeps_its_steady_bits() {
        let ulp = f32::EPSILON;
        let pairs = [
            (1.0, 1.0),
            (1.0 + ulp, 1.0),
            (1.0 + 7.0 * ulp, 1.0),
            (1.0 + 8.0 * ulp, 1.0 + 16.0 * ulp),
            (-1.0 - 9.0 * ulp, -1.0 - 16.0 * ulp),
            // The next power of two.
            (2.0 - ulp, 2.0),
            (0.0, 0.0),
            (f32::INFINITY, f32::INFINITY),
        ];
        let (values, wanted): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        assert_eq!(Array::float([8], values).rounded(DType::Float32), Array::float([8], wanted));
        assert!(shortened(f32::NAN).is_nan());
    }
}
