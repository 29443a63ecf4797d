//! The model's tensors as its files hold them, quantized layers as integers and scales.
use super::ConvertError;
use crate::checkpoint::trtllm::Group;
use crate::checkpoint::{InputScale, QuantizedLinear};
use crate::source::ModelSource;
use graphs::Format;
use quant::{Entry, Source, SourceError};
use serde_json::{Value, json};

pub(super) struct RawSource<'s> {
    pub(super) source: &'s ModelSource,
}

/// What quantized layers have beside `.weight` in NVIDIA's layouts.
const EXTRAS: [&str; 3] = [".weight_scale", ".pre_quant_scale", ".input_scale"];

impl RawSource<'_> {
    /// The checkpoint that has a tensor, and the name there.
    fn find(&self, name: &str) -> Option<(&crate::checkpoint::Checkpoint, String)> {
        if let Some(ending) = EXTRAS.into_iter().find(|ending| name.ends_with(ending)) {
            let (checkpoint, weight) = self.source.stored(&format!("{}.weight", name.strip_suffix(ending)?))?;
            return Some((checkpoint, format!("{}{ending}", weight.strip_suffix(".weight")?)));
        }
        self.source.stored(name).map(|(checkpoint, stored)| (checkpoint, stored.to_owned()))
    }

    /// The `quantization` object of config.json, for layers that are quantized in one way but for the head.
    pub(super) fn quantization(&self, groups: &[Group]) -> Result<Value, ConvertError> {
        let matrices = groups.iter().flat_map(|group| &group.fields).filter(|field| field.linear);
        let mut first: Option<(&str, Option<&QuantizedLinear>)> = None;
        let mut prescaled = false;
        for part in matrices.flat_map(|field| &field.parts).filter(|part| self.find(&part.name).is_some()) {
            let linear = self.source.quantized_linear(&part.name);
            if let Some(tool) = self.source.quantized_by(&part.name).filter(|tool| *tool != "modelopt") {
                return Err(ConvertError::Tool { tool });
            }
            prescaled |= linear.is_some_and(|linear| linear.prescale);
            let way = |linear: Option<&QuantizedLinear>| linear.map(|linear| (linear.format, linear.inputs.clone()));
            match first {
                None => first = Some((&part.name, linear)),
                Some((other, found)) if way(found) != way(linear) => {
                    return Err(ConvertError::Mixed { tensor: part.name.clone(), other: other.to_owned() });
                }
                Some(_) => (),
            }
        }
        let mut config = json!({ "quant_algo": null, "kv_cache_quant_algo": null });
        let Some(linear) = first.and_then(|(_, linear)| linear) else { return Ok(config) };
        match (linear.format, &linear.inputs) {
            (Format::Int8, InputScale::None) => config["quant_algo"] = json!("W8A16"),
            (Format::Int8, _) => config["quant_algo"] = json!("W8A8_SQ_PER_CHANNEL"),
            (Format::Int4 { group }, _) => {
                config["quant_algo"] = json!("W4A16_AWQ");
                config["group_size"] = json!(group);
                config["has_zero_point"] = json!(false);
                config["pre_quant_scale"] = json!(prescaled);
            }
        }
        config["exclude_modules"] = json!(["lm_head"]);
        Ok(config)
    }
}

impl Source for RawSource<'_> {
    fn entry(&self, name: &str) -> Option<Entry> {
        let (checkpoint, stored) = self.find(name)?;
        checkpoint.weights().tensor(&stored).map(|entry| Entry { dtype: entry.dtype, shape: entry.shape.clone() })
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let missing = || SourceError::new(format!("there is no tensor `{name}`"));
        let (checkpoint, stored) = self.find(name).ok_or_else(missing)?;
        checkpoint.weights().read_into(&stored, offset, buffer).map_err(SourceError::new)
    }
}
