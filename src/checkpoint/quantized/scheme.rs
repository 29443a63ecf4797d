//! What config.json, or the file that a tool writes beside it, says of the quantization.
use super::QuantizedFault;
use crate::checkpoint::CheckpointError;
use serde_json::{Map, Value};

/// The tool whose layout the tensors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    AutoAwq,
    Gptq,
    CompressedTensors,
    Modelopt,
}

/// What the config says of groups of inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    /// Nothing: the shapes of the scales tell.
    Told,
    /// One for all inputs.
    Whole,
    Of(usize),
}

/// How the inputs of a layer are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inputs {
    Plain,
    /// By one scale, known beforehand.
    Static,
    /// By a scale of each token's own.
    Token,
}

/// One way in which layers are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) bits: usize,
    pub(super) group: Group,
    pub(super) symmetric: bool,
    pub(super) inputs: Inputs,
}

#[derive(Clone, Debug, PartialEq)]
pub(in crate::checkpoint) struct Scheme {
    pub(super) method: Method,
    pub(super) kinds: Vec<Kind>,
    /// GPTQ's first format stores zero points less by one.
    pub(super) less_one: bool,
}

/// An object of a config with its place, for messages.
struct Keys<'v> {
    object: &'v Map<String, Value>,
    path: String,
}

impl<'v> Keys<'v> {
    fn get(&self, key: &str) -> Option<&'v Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn wrong(&self, key: &str, found: &Value, wanted: &'static str) -> QuantizedFault {
        let found: String = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
        QuantizedFault::Setting { key: self.key(key), found: found.chars().take(200).collect(), wanted }
    }

    fn object(&self, key: &str) -> Result<Option<Keys<'v>>, QuantizedFault> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Keys { object, path: self.key(key) })),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }

    fn text(&self, key: &str, default: &'v str) -> Result<&'v str, QuantizedFault> {
        self.get(key).map_or(Ok(default), |value| value.as_str().ok_or_else(|| self.wrong(key, value, "a text")))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, QuantizedFault> {
        let wrong = |value| self.wrong(key, value, "true or false");
        self.get(key).map_or(Ok(default), |value| value.as_bool().ok_or_else(|| wrong(value)))
    }

    /// One of the numbers of bits that can be read.
    fn bits(&self, key: &str, default: Option<usize>, wanted: &'static str) -> Result<usize, QuantizedFault> {
        let allowed = if wanted.contains('8') { &[4, 8][..] } else { &[4] };
        match (self.get(key), default) {
            (None, Some(bits)) => Ok(bits),
            (found, _) => {
                let found = found.unwrap_or(&Value::Null);
                let bits = found.as_u64().and_then(|bits| usize::try_from(bits).ok());
                bits.filter(|bits| allowed.contains(bits)).ok_or_else(|| self.wrong(key, found, wanted))
            }
        }
    }

    fn group(&self, key: &str) -> Result<Group, QuantizedFault> {
        let Some(found) = self.get(key) else { return Ok(Group::Told) };
        match found.as_i64() {
            Some(-1) => Ok(Group::Whole),
            Some(size @ 1..) => Ok(Group::Of(usize::try_from(size).unwrap_or(usize::MAX))),
            _ => Err(self.wrong(key, found, "a number of inputs, or -1")),
        }
    }

    /// Refuses a key that is set to anything but nothing.
    fn unset(&self, key: &str, wanted: &'static str) -> Result<(), QuantizedFault> {
        match self.get(key) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(Value::Object(object)) if object.is_empty() => Ok(()),
            Some(Value::Array(list)) if list.is_empty() => Ok(()),
            Some(found) => Err(self.wrong(key, found, wanted)),
        }
    }

    fn no_cache(&self, key: &str) -> Result<(), QuantizedFault> {
        match self.get(key) {
            None => Ok(()),
            Some(found) => {
                let text = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
                let found = text.chars().take(200).collect();
                Err(QuantizedFault::KeyValueCache { key: self.key(key), found })
            }
        }
    }
}

/// Where a config may say it: at its root, or in that of its text part.
const PLACES: [&[&str]; 3] =
    [&["quantization_config"], &["text_config", "quantization_config"], &["compression_config"]];

/// Gives the object in another file of the folder, where there is one.
type Beside<'b> = &'b mut dyn FnMut(&str) -> Result<Option<Map<String, Value>>, CheckpointError>;

/// Reads `config.json`; `beside` gives the object in another file of the folder.
pub(in crate::checkpoint) fn read_scheme(
    config: &Map<String, Value>,
    beside: Beside<'_>,
) -> Result<Option<Scheme>, CheckpointError> {
    let value = |path: &&[&str]| {
        let mut steps = path.iter();
        let first = config.get(*steps.next()?)?;
        steps.try_fold(first, |value, key| value.get(key)).filter(|value| !value.is_null())
    };
    if let Some(file) = beside("hf_quant_config.json")? {
        return Ok(modelopt_file(&Keys { object: &file, path: String::new() })?);
    }
    if let Some((place, found)) = PLACES.iter().find_map(|place| Some((place, value(place)?))) {
        let path = place.join(".");
        let Value::Object(object) = found else {
            let found = found.to_string().chars().take(200).collect();
            return Err(QuantizedFault::Setting { key: path, found, wanted: "an object" }.into());
        };
        return Ok(Some(by_method(&Keys { object, path })?));
    }
    // AutoGPTQ's and AutoAWQ's own files, from before config.json told.
    for (name, read) in [("quantize_config.json", gptq as fn(&Keys<'_>) -> _), ("quant_config.json", awq)] {
        if let Some(file) = beside(name)? {
            return Ok(Some(read(&Keys { object: &file, path: String::new() })?));
        }
    }
    Ok(None)
}

fn by_method(keys: &Keys<'_>) -> Result<Scheme, QuantizedFault> {
    match keys.text("quant_method", "")? {
        "awq" => awq(keys),
        "gptq" => gptq(keys),
        "compressed-tensors" => compressed_tensors(keys),
        "modelopt" => modelopt(keys),
        other => {
            let wanted = "`awq`, `gptq`, `compressed-tensors` or `modelopt`";
            Err(QuantizedFault::Setting {
                key: keys.key("quant_method"),
                found: other.chars().take(200).collect(),
                wanted,
            })
        }
    }
}

fn awq(keys: &Keys<'_>) -> Result<Scheme, QuantizedFault> {
    // AutoAWQ's own file has other names for two of them.
    let either = |key: &'static str, own: &'static str| if keys.get(key).is_some() { key } else { own };
    let version = keys.text("version", "gemm")?;
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(keys.wrong("version", &version.into(), "`gemm`"));
    }
    let kind = Kind {
        bits: keys.bits(either("bits", "w_bit"), None, "4")?,
        group: keys.group(either("group_size", "q_group_size"))?,
        symmetric: !keys.flag("zero_point", true)?,
        inputs: Inputs::Plain,
    };
    Ok(Scheme { method: Method::AutoAwq, kinds: vec![kind], less_one: false })
}

fn gptq(keys: &Keys<'_>) -> Result<Scheme, QuantizedFault> {
    let format = keys.text("checkpoint_format", "gptq")?;
    if !["gptq", "gptq_v2"].contains(&format) {
        return Err(keys.wrong("checkpoint_format", &format.into(), "`gptq` or `gptq_v2`"));
    }
    keys.unset("is_marlin_format", "false")?;
    // Rules for single layers (GPTQModel) may change the group and whether it is symmetric: the tensors tell.
    let rules = keys.get("dynamic").is_some_and(|rules| !matches!(rules, Value::Object(rules) if rules.is_empty()));
    let group = keys.group("group_size")?;
    let kind = Kind {
        bits: keys.bits("bits", None, "4 or 8")?,
        group: if rules { Group::Told } else { group },
        symmetric: keys.flag("sym", false)? && !rules,
        inputs: Inputs::Plain,
    };
    Ok(Scheme { method: Method::Gptq, kinds: vec![kind], less_one: format == "gptq" })
}

fn compressed_tensors(keys: &Keys<'_>) -> Result<Scheme, QuantizedFault> {
    keys.no_cache("kv_cache_scheme")?;
    let plain = "nothing: transforms of weights and inputs are not supported";
    if let Some(transforms) = keys.object("transform_config")? {
        transforms.unset("config_groups", plain)?;
    }
    if let Some(sparsity) = keys.object("sparsity_config")? {
        let format = sparsity.text("format", "dense")?;
        if format != "dense" {
            return Err(sparsity.wrong("format", &format.into(), "`dense`"));
        }
    }
    let status = keys.text("quantization_status", "compressed")?;
    if status != "compressed" {
        return Err(keys.wrong("quantization_status", &status.into(), "`compressed`"));
    }
    let missing = || keys.wrong("config_groups", &Value::Null, "an object with at least one group");
    let groups = keys.object("config_groups")?.ok_or_else(missing)?;
    let mut kinds = Vec::new();
    for name in groups.object.keys() {
        let group = groups.object(name)?.ok_or_else(missing)?;
        let format = group.text("format", keys.text("format", "pack-quantized")?)?;
        if !["pack-quantized", "int-quantized", "naive-quantized"].contains(&format) {
            return Err(group.wrong("format", &format.into(), "`pack-quantized` or `int-quantized`"));
        }
        group.unset("output_activations", "nothing: quantized outputs are not supported")?;
        let weights = || group.wrong("weights", &Value::Null, "an object");
        kinds.push(compressed_kind(&group.object("weights")?.ok_or_else(weights)?, &group)?);
    }
    if kinds.is_empty() {
        return Err(missing());
    }
    Ok(Scheme { method: Method::CompressedTensors, kinds, less_one: false })
}

fn compressed_kind(weights: &Keys<'_>, group: &Keys<'_>) -> Result<Kind, QuantizedFault> {
    let integers = |keys: &Keys<'_>| match keys.text("type", "int")? {
        "int" => Ok(()),
        other => Err(keys.wrong("type", &other.into(), "`int`")),
    };
    integers(weights)?;
    let strategy = weights.text("strategy", if weights.get("group_size").is_some() { "group" } else { "channel" })?;
    let size = match strategy {
        "group" => weights.group("group_size")?,
        "channel" | "tensor" => Group::Whole,
        other => return Err(weights.wrong("strategy", &other.into(), "`group`, `channel` or `tensor`")),
    };
    let inputs = match group.object("input_activations")? {
        None => Inputs::Plain,
        Some(inputs) => {
            integers(&inputs)?;
            inputs.bits("num_bits", None, "8").and_then(|bits| match bits {
                8 => Ok(()),
                other => Err(inputs.wrong("num_bits", &other.into(), "8")),
            })?;
            if !inputs.flag("symmetric", true)? {
                return Err(inputs.wrong(
                    "symmetric",
                    &false.into(),
                    "true: inputs with zero points are not supported",
                ));
            }
            let dynamic = inputs.get("dynamic").unwrap_or(&Value::Bool(false));
            let strategy = inputs.text("strategy", "tensor")?;
            match (dynamic, strategy) {
                (Value::Bool(true), "token") => Inputs::Token,
                (Value::Bool(false), "tensor") => Inputs::Static,
                (Value::Bool(dynamic), other) => {
                    let wanted =
                        if *dynamic { "`token`, with `dynamic` true" } else { "`tensor`, with `dynamic` false" };
                    return Err(inputs.wrong("strategy", &other.into(), wanted));
                }
                (other, _) => return Err(inputs.wrong("dynamic", other, "true or false")),
            }
        }
    };
    let symmetric = weights.flag("symmetric", true)?;
    if !symmetric && inputs != Inputs::Plain {
        return Err(weights.wrong("symmetric", &false.into(), "true where inputs are quantized too"));
    }
    Ok(Kind { bits: weights.bits("num_bits", None, "4 or 8")?, group: size, symmetric, inputs })
}

/// `hf_quant_config.json`; `None` where it says that nothing is quantized.
fn modelopt_file(keys: &Keys<'_>) -> Result<Option<Scheme>, QuantizedFault> {
    let missing = || keys.wrong("quantization", &Value::Null, "an object");
    let keys = keys.object("quantization")?.ok_or_else(missing)?;
    keys.no_cache("kv_cache_quant_algo")?;
    if keys.get("quant_algo").is_none() { Ok(None) } else { modelopt(&keys).map(Some) }
}

/// What config.json of a TensorRT-LLM checkpoint says; its tensors are given the unified layout's names.
pub(in crate::checkpoint) fn rank_scheme(config: &Map<String, Value>) -> Result<Option<Scheme>, CheckpointError> {
    match config.get("quantization") {
        None | Some(Value::Null) => Ok(None),
        Some(_) => Ok(modelopt_file(&Keys { object: config, path: String::new() })?),
    }
}

fn modelopt(keys: &Keys<'_>) -> Result<Scheme, QuantizedFault> {
    keys.no_cache("kv_cache_quant_algo")?;
    keys.no_cache("kv_cache_scheme")?;
    let algorithm = keys.text("quant_algo", "")?;
    let (bits, group, inputs) = match algorithm {
        "W4A16_AWQ" | "W4A16" => (4, keys.group("group_size")?, Inputs::Plain),
        "W8A8_SQ_PER_CHANNEL" => (8, Group::Whole, Inputs::Static),
        "W8A16" => (8, Group::Whole, Inputs::Plain),
        other => {
            let wanted = "`W4A16_AWQ`, `W8A8_SQ_PER_CHANNEL` or `W8A16`";
            return Err(keys.wrong("quant_algo", &other.into(), wanted));
        }
    };
    keys.unset("has_zero_point", "false")?;
    Ok(Scheme { method: Method::Modelopt, kinds: vec![Kind { bits, group, symmetric: true, inputs }], less_one: false })
}
