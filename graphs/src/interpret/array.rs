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

impl Array {
    pub fn float(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Array {
        Array { shape: shape.into(), data: Data::Float(data) }
    }

    pub fn int(shape: impl Into<Vec<usize>>, data: Vec<i32>) -> Array {
        Array { shape: shape.into(), data: Data::Int(data) }
    }

    /// With values as `dtype` holds them.
    pub(super) fn rounded(mut self, dtype: DType) -> Array {
        if let Data::Float(data) = &mut self.data {
            match dtype {
                DType::Float16 => data.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
                DType::Bfloat16 => data.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
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
