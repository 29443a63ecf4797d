//! Small models in the layouts of the tools, packed one integer at a time by the words of their formats.
use crate::common::{llama_config, random_tensors};
use crate::files::{Raw, Raws, write};
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tool {
    Awq,
    GptqV1,
    GptqV2,
    Compressed,
    Unified,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    pub(crate) tool: Tool,
    pub(crate) bits: usize,
    /// 0 for all inputs.
    pub(crate) group: usize,
    pub(crate) symmetric: bool,
    pub(crate) scales: &'static str,
    pub(crate) shards: usize,
}

/// A matrix: unsigned integers `[out, in]`, unsigned zero points and scales `[out, groups]`.
pub(crate) struct Matrix {
    pub(crate) out: usize,
    pub(crate) input: usize,
    pub(crate) groups: usize,
    pub(crate) integers: Vec<u32>,
    pub(crate) zeros: Vec<u32>,
    pub(crate) scales: Vec<f32>,
}

pub(crate) fn config() -> Value {
    llama_config(json!({ "hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 2 }))
}

impl Matrix {
    fn new(name: &str, out: usize, input: usize, variant: Variant) -> Matrix {
        let mut state = name.bytes().fold(17u32, |state, byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let mut next = |bound: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % bound
        };
        let groups = input.checked_div(variant.group).unwrap_or(1);
        let (range, middle) = (1u32 << variant.bits, 1u32 << (variant.bits - 1));
        let integers = (0..out * input).map(|_| next(range)).collect();
        // In GPTQ's first format the largest that can be told is 15.
        let zeros = (0..out * groups).map(|_| if variant.symmetric { middle } else { 1 + next(range - 1) }).collect();
        let narrow = |scale: f32| match variant.scales {
            "F16" => f16::from_f32(scale).to_f32(),
            "BF16" => bf16::from_f32(scale).to_f32(),
            _ => scale,
        };
        let size = 4.0 / (range as f32 * (input as f32).sqrt());
        let scales = (0..out * groups).map(|_| narrow((0.5 + next(1000) as f32 / 1000.0) * size)).collect();
        Matrix { out, input, groups, integers, zeros, scales }
    }

    fn group_of(&self, input: usize) -> usize {
        input / (self.input / self.groups)
    }

    /// (q - z) s.
    pub(crate) fn dequantized(&self) -> Vec<f32> {
        let value = |at: usize| {
            let place = at / self.input * self.groups + self.group_of(at % self.input);
            (self.integers[at] as f32 - self.zeros[place] as f32) * self.scales[place]
        };
        (0..self.integers.len()).map(value).collect()
    }

    fn files(&self, path: &str, variant: Variant, tensors: &mut Raws) {
        let (out, input, groups, bits) = (self.out, self.input, self.groups, variant.bits);
        let (per, middle) = (32 / bits, 1i64 << (bits - 1));
        let q = |output: usize, at: usize| self.integers[output * input + at];
        let z = |output: usize, group: usize| self.zeros[output * groups + group];
        let s = |output: usize, group: usize| self.scales[output * groups + group];
        let mut add = |part: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>| {
            let raw = Raw { dtype: dtype.into(), shape: shape.to_vec(), bytes };
            tensors.insert(format!("{path}.{part}"), raw);
        };
        let words = |values: &mut dyn Iterator<Item = u32>| values.flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        let joined =
            |values: &mut dyn Iterator<Item = u32>| values.enumerate().fold(0, |word, (i, q)| word | q << (bits * i));
        let float = |value: f32| match variant.scales {
            "F16" => f16::from_f32(value).to_le_bytes().to_vec(),
            "BF16" => bf16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        let by_group = || (0..groups).flat_map(|group| (0..out).map(move |output| (output, group)));
        let by_output = || (0..out).flat_map(|output| (0..groups).map(move |group| (output, group)));
        match variant.tool {
            Tool::Awq => {
                let order = [0, 2, 4, 6, 1, 3, 5, 7];
                let packed = |at: usize, first: usize| joined(&mut order.into_iter().map(|k| q(first + k, at)));
                let mut values = (0..input).flat_map(|at| (0..out).step_by(8).map(move |first| packed(at, first)));
                add("qweight", "I32", &[input, out / 8], words(&mut values));
                let packed = |group: usize, first: usize| joined(&mut order.into_iter().map(|k| z(first + k, group)));
                let mut values =
                    (0..groups).flat_map(|group| (0..out).step_by(8).map(move |first| packed(group, first)));
                add("qzeros", "I32", &[groups, out / 8], words(&mut values));
                add("scales", variant.scales, &[groups, out], by_group().flat_map(|(o, g)| float(s(o, g))).collect());
            }
            Tool::GptqV1 | Tool::GptqV2 => {
                let less = u32::from(variant.tool == Tool::GptqV1);
                let packed = |first: usize, output: usize| joined(&mut (0..per).map(|k| q(output, first + k)));
                let mut values =
                    (0..input).step_by(per).flat_map(|first| (0..out).map(move |output| packed(first, output)));
                add("qweight", "I32", &[input / per, out], words(&mut values));
                let packed = |group: usize, first: usize| joined(&mut (0..per).map(|k| z(first + k, group) - less));
                let mut values =
                    (0..groups).flat_map(|group| (0..out).step_by(per).map(move |first| packed(group, first)));
                add("qzeros", "I32", &[groups, out / per], words(&mut values));
                add("scales", variant.scales, &[groups, out], by_group().flat_map(|(o, g)| float(s(o, g))).collect());
                add("g_idx", "I32", &[input], words(&mut (0..input).map(|at| self.group_of(at) as u32)));
            }
            Tool::Compressed if variant.bits == 4 || !variant.symmetric => {
                let packed = |output: usize, first: usize| joined(&mut (0..per).map(|k| q(output, first + k)));
                let mut values =
                    (0..out).flat_map(|output| (0..input).step_by(per).map(move |first| packed(output, first)));
                add("weight_packed", "I32", &[out, input / per], words(&mut values));
                if !variant.symmetric {
                    let packed = |first: usize, group: usize| joined(&mut (0..per).map(|k| z(first + k, group)));
                    let mut values =
                        (0..out).step_by(per).flat_map(|first| (0..groups).map(move |group| packed(first, group)));
                    add("weight_zero_point", "I32", &[out / per, groups], words(&mut values));
                }
                add(
                    "weight_scale",
                    variant.scales,
                    &[out, groups],
                    by_output().flat_map(|(o, g)| float(s(o, g))).collect(),
                );
                let sizes = [out as u64, input as u64].into_iter().flat_map(u64::to_le_bytes).collect();
                add("weight_shape", "I64", &[2], sizes);
            }
            Tool::Compressed | Tool::Unified => {
                let signed = |output: usize, at: usize| (i64::from(q(output, at)) - middle) as i8 as u8;
                if bits == 8 {
                    let values = (0..out).flat_map(|output| (0..input).map(move |at| signed(output, at)));
                    add("weight", "I8", &[out, input], values.collect());
                } else {
                    let pair = |output: usize, at: usize| signed(output, at) & 15 | signed(output + 1, at) << 4;
                    let values = (0..out).step_by(2).flat_map(|output| (0..input).map(move |at| pair(output, at)));
                    add("weight", "U8", &[out / 2, input], values.collect());
                }
                let whole = bits == 8 && variant.tool == Tool::Unified;
                let shape = if whole { vec![out] } else { vec![out, groups] };
                add("weight_scale", variant.scales, &shape, by_output().flat_map(|(o, g)| float(s(o, g))).collect());
                if whole {
                    add("input_scale", "F32", &[], 0.02f32.to_le_bytes().to_vec());
                }
            }
        }
    }
}

fn quantization(variant: Variant) -> Value {
    let Variant { tool, bits, group, symmetric, .. } = variant;
    let size = if group == 0 { json!(-1) } else { json!(group) };
    match tool {
        Tool::Awq => {
            json!({ "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": !symmetric, "version": "GEMM" })
        }
        Tool::GptqV1 | Tool::GptqV2 => json!({
            "quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": false,
            "checkpoint_format": if tool == Tool::GptqV1 { "gptq" } else { "gptq_v2" },
        }),
        Tool::Compressed => json!({
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "kv_cache_scheme": null,
            "format": if bits == 4 || !symmetric { "pack-quantized" } else { "int-quantized" },
            "config_groups": { "group_0": {
                "targets": ["Linear"], "input_activations": null, "output_activations": null,
                "weights": { "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": false,
                    "strategy": if group == 0 { "channel" } else { "group" },
                    "group_size": if group == 0 { json!(null) } else { json!(group) } },
            } },
        }),
        Tool::Unified => json!({
            "quant_method": "modelopt", "quant_algo": if bits == 4 { "W4A16_AWQ" } else { "W8A8_SQ_PER_CHANNEL" },
        }),
    }
}

/// Writes the model as the tool would; gives its matrices by path, and writes the same in plain floats to `plain`.
pub(crate) fn model(mut config: Value, variant: Variant, folder: &Path, plain: &Path) -> BTreeMap<String, Matrix> {
    let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let (mut quantized, mut same, mut matrices) = (Raws::new(), Raws::new(), BTreeMap::new());
    for (name, (shape, values)) in random_tensors(&config) {
        let raw = |values: &[f32]| Raw { dtype: "F32".into(), shape: shape.clone(), bytes: floats(values) };
        let is_language = |path: &&str| path.ends_with("_proj") && !path.contains("vision_tower");
        match name.strip_suffix(".weight").filter(is_language) {
            None => {
                quantized.insert(name.clone(), raw(&values));
                same.insert(name, raw(&values));
            }
            Some(path) => {
                let matrix = Matrix::new(path, shape[0], shape[1], variant);
                matrix.files(path, variant, &mut quantized);
                same.insert(name.clone(), raw(&matrix.dequantized()));
                matrices.insert(path.to_owned(), matrix);
            }
        }
    }
    for (folder, tensors, shards) in [(folder, &quantized, variant.shards), (plain, &same, 1)] {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        if shards == 1 {
            write(&folder.join("model.safetensors"), tensors);
            continue;
        }
        let mut map = Map::new();
        for shard in 0..shards {
            let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
            let part: Raws = tensors.iter().skip(shard).step_by(shards).map(|(k, v)| (k.clone(), v.clone())).collect();
            write(&folder.join(&file), &part);
            map.extend(part.keys().map(|name| (name.clone(), json!(file))));
        }
        let index = json!({ "metadata": {}, "weight_map": map });
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    config["quantization_config"] = quantization(variant);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    matrices
}
