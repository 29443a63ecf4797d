//! Element types, of tensors in a network and of tensors in files.
use serde::{Deserialize, Serialize};

/// An element type. Names are those of Hugging Face configs (`float16`), [`DType::safetensors`] gives those of files (`F16`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    Float32,
    Float16,
    Bfloat16,
    Int32,
    Int64,
    Int8,
    Uint8,
    /// Two elements a byte, low nibble first, two's complement.
    Int4,
    Bool,
}

impl DType {
    const NAMES: [(DType, &'static str, &'static str); 9] = [
        (DType::Float32, "float32", "F32"),
        (DType::Float16, "float16", "F16"),
        (DType::Bfloat16, "bfloat16", "BF16"),
        (DType::Int32, "int32", "I32"),
        (DType::Int64, "int64", "I64"),
        (DType::Int8, "int8", "I8"),
        (DType::Uint8, "uint8", "U8"),
        (DType::Int4, "int4", "I4"),
        (DType::Bool, "bool", "BOOL"),
    ];

    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].1
    }

    /// The name that safetensors headers use.
    pub fn safetensors(self) -> &'static str {
        Self::NAMES[self as usize].2
    }

    /// Reads either spelling: `float16` or `F16`, also with the prefix `torch.`.
    pub fn parse(text: &str) -> Option<DType> {
        let text = text.strip_prefix("torch.").unwrap_or(text);
        Self::NAMES.iter().find(|(_, name, file)| *name == text || *file == text).map(|row| row.0)
    }

    pub fn is_float(self) -> bool {
        matches!(self, DType::Float32 | DType::Float16 | DType::Bfloat16)
    }

    pub fn bits(self) -> usize {
        match self {
            DType::Int64 => 64,
            DType::Float32 | DType::Int32 => 32,
            DType::Float16 | DType::Bfloat16 => 16,
            DType::Int8 | DType::Uint8 | DType::Bool => 8,
            DType::Int4 => 4,
        }
    }

    /// Bytes of `count` elements, a last half byte rounded up.
    pub fn bytes(self, count: usize) -> usize {
        (count * self.bits()).div_ceil(8)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_table_agree() {
        for (dtype, name, file) in DType::NAMES {
            assert_eq!((dtype.name(), dtype.safetensors()), (name, file));
            assert_eq!(DType::parse(name), Some(dtype));
            assert_eq!(DType::parse(file), Some(dtype));
        }
        assert_eq!(DType::parse("torch.bfloat16"), Some(DType::Bfloat16));
        assert_eq!(DType::Int4.bytes(3), 2);
    }
}
