//! How integers lie in the files of each tool, and how they are taken out: pure functions on bytes.
//!
//! Sources of the layouts: AutoAWQ `awq/utils/packing_utils.py` (casper-hansen/AutoAWQ), AutoGPTQ
//! `auto_gptq/nn_modules/qlinear/qlinear_cuda.py` (AutoGPTQ/AutoGPTQ), compressed-tensors
//! `compressors/quantized_compressors/pack_quantized.py` (neuralmagic/compressed-tensors), modelopt
//! `torch/export/quant_utils.py` (NVIDIA/Model-Optimizer); and files that these tools wrote.
use std::ops::Range;

/// Where in its word of eight AutoAWQ puts an output: nibbles hold outputs 0 2 4 6 1 3 5 7.
const AWQ_PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How a matrix of logical shape `[out, in]` is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// I32 `[in, out / 8]`, in AutoAWQ's order.
    AwqOutputs,
    /// I32 `[in * bits / 32, out]`, lowest bits first.
    Inputs,
    /// I32 `[out, in * bits / 32]` rounded up, lowest bits first.
    Rows,
    /// I8 `[out, in]`, two's complement.
    Bytes,
    /// U8 `[out / 2, in]`, the even output low, two's complement.
    PairsOfOutputs,
}

impl Packing {
    /// Bytes of a row where rows lie together, with how many outputs share it.
    pub(super) fn row(self, bits: usize, input: usize) -> Option<(usize, usize)> {
        match self {
            Packing::AwqOutputs | Packing::Inputs => None,
            Packing::Rows => Some((4 * (input * bits).div_ceil(32), 1)),
            Packing::Bytes => Some((input, 1)),
            Packing::PairsOfOutputs => Some((input, 2)),
        }
    }
}

/// The integers of `rows` around 0 (unsigned ones less half their range), `[rows, in]`. `bytes` are those of the rows
/// alone where rows lie together, else of the whole matrix `[out, in]`.
pub(super) fn unpack(
    packing: Packing,
    bits: usize,
    [out, input]: [usize; 2],
    rows: Range<usize>,
    bytes: &[u8],
) -> Vec<i8> {
    let mut values = vec![0i8; rows.len() * input];
    let (per, mask, middle) = (32 / bits, (1u32 << bits) - 1, 1i32 << (bits - 1));
    let centred = |word: u32, place: usize| ((word >> (bits * place) & mask) as i32 - middle) as i8;
    match packing {
        Packing::AwqOutputs => {
            for (at, line) in words(bytes).chunks_exact(out / 8).enumerate() {
                for (row, into) in rows.clone().zip(values.chunks_exact_mut(input)) {
                    into[at] = centred(word(&line[row / 8]), AWQ_PLACE[row % 8]);
                }
            }
        }
        Packing::Inputs => {
            for (at, line) in words(bytes).chunks_exact(out).enumerate() {
                for (found, into) in line[rows.clone()].iter().zip(values.chunks_exact_mut(input)) {
                    for (place, into) in into[at * per..].iter_mut().take(per).enumerate() {
                        *into = centred(word(found), place);
                    }
                }
            }
        }
        Packing::Rows => {
            let line = (input * bits).div_ceil(32);
            for (line, into) in words(bytes).chunks_exact(line).zip(values.chunks_exact_mut(input)) {
                for (found, into) in line.iter().zip(into.chunks_mut(per)) {
                    into.iter_mut().enumerate().for_each(|(place, into)| *into = centred(word(found), place));
                }
            }
        }
        Packing::Bytes => values.iter_mut().zip(bytes).for_each(|(into, byte)| *into = *byte as i8),
        Packing::PairsOfOutputs => {
            let first = rows.start / 2;
            for (row, into) in rows.clone().zip(values.chunks_exact_mut(input)) {
                let line = &bytes[(row / 2 - first) * input..][..input];
                for (byte, into) in line.iter().zip(into) {
                    let nibble = if row % 2 == 0 { byte << 4 } else { *byte };
                    *into = nibble as i8 >> 4;
                }
            }
        }
    }
    values
}

fn words(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks::<4>().0
}

fn word(bytes: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*bytes)
}

/// How zero points `[groups, out]` are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroPacking {
    /// I32 `[groups, out / 8]`, in AutoAWQ's order.
    Awq,
    /// I32 `[groups, out * bits / 32]`, lowest bits first.
    Outputs,
    /// The same, each less by one.
    OutputsLessOne,
    /// I32 `[out * bits / 32, groups]` rounded up, lowest bits first.
    Columns,
    /// I8 `[out, groups]`, around 0.
    Bytes,
}

/// Zero points less half their range, `[groups, out]`.
pub(super) fn zeros(packing: ZeroPacking, bits: usize, [groups, out]: [usize; 2], bytes: &[u8]) -> Vec<i32> {
    let (per, mask, middle) = (32 / bits, (1u32 << bits) - 1, 1i32 << (bits - 1));
    let packed = |at: usize, place: usize| {
        let found = words(bytes).get(at).map_or(0, word);
        (found >> (bits * place) & mask) as i32 - middle
    };
    let width = (out * bits).div_ceil(32);
    let one = |group: usize, output: usize| match packing {
        ZeroPacking::Awq => packed(group * width + output / 8, AWQ_PLACE[output % 8]),
        ZeroPacking::Outputs => packed(group * width + output / per, output % per),
        ZeroPacking::OutputsLessOne => packed(group * width + output / per, output % per) + 1,
        ZeroPacking::Columns => packed(output / per * groups + group, output % per),
        ZeroPacking::Bytes => bytes.get(output * groups + group).map_or(0, |byte| i32::from(*byte as i8)),
    };
    (0..groups)
        .flat_map(|group| (0..out).map(move |output| (group, output)))
        .map(|(group, output)| one(group, output))
        .collect()
}
