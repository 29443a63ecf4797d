//! Typed reading of Hugging Face configs, with the key in every error.
use crate::{ActivationKind, GraphError, Heads, Rope, RopeScaling};
use serde_json::Value;

/// Sizes past this are not those of any model; the bound keeps products of sizes far from overflow.
const LARGEST: u64 = 1 << 24;

/// One object of a config and its place in it.
#[derive(Clone)]
pub(crate) struct Keys<'a> {
    value: Option<&'a Value>,
    path: String,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(value: &'a Value) -> Keys<'a> {
        Keys { value: Some(value), path: String::new() }
    }

    /// A nested object; a missing one reads as empty, so that its keys take their defaults.
    pub(crate) fn object(&self, key: &str) -> Result<Keys<'a>, GraphError> {
        match self.get(key) {
            None => Ok(Keys { value: None, path: self.join(key) }),
            Some(value) if value.is_object() => Ok(Keys { value: Some(value), path: self.join(key) }),
            Some(found) => Err(self.wrong(key, "an object", found)),
        }
    }

    fn join(&self, key: &str) -> String {
        if self.path.is_empty() { key.into() } else { format!("{}.{key}", self.path) }
    }

    /// The value of a key; null counts as missing, as in Hugging Face's configs.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.and_then(|value| value.get(key)).filter(|value| !value.is_null())
    }

    pub(crate) fn wrong(&self, key: &str, wanted: &str, found: &Value) -> GraphError {
        self.fault(key, format!("wanted {wanted}, found `{found}`"))
    }

    pub(crate) fn fault(&self, key: &str, reason: String) -> GraphError {
        GraphError::Config { key: self.join(key), reason }
    }

    /// A size of at least 1.
    pub(crate) fn size(&self, key: &str, default: usize) -> Result<usize, GraphError> {
        match self.get(key) {
            None => Ok(default),
            Some(found) => match found.as_u64() {
                Some(size) if (1..=LARGEST).contains(&size) => Ok(size as usize),
                _ => Err(self.wrong(key, &format!("a whole number from 1 to {LARGEST}"), found)),
            },
        }
    }

    /// Sizes of at least 1, at least one of them.
    pub(crate) fn sizes(&self, key: &str, default: &[usize]) -> Result<Vec<usize>, GraphError> {
        let Some(found) = self.get(key) else { return Ok(default.to_vec()) };
        let size = |value: &Value| value.as_u64().filter(|size| (1..=LARGEST).contains(size)).map(|size| size as usize);
        let sizes = found.as_array().and_then(|list| list.iter().map(size).collect::<Option<Vec<_>>>());
        let wanted = || self.wrong(key, &format!("a list of whole numbers from 1 to {LARGEST}"), found);
        sizes.filter(|sizes| !sizes.is_empty()).ok_or_else(wanted)
    }

    /// Height and width: two sizes, or one for both.
    pub(crate) fn sides(&self, key: &str, default: usize) -> Result<[usize; 2], GraphError> {
        match self.get(key) {
            Some(found) if found.is_array() => <[usize; 2]>::try_from(self.sizes(key, &[])?)
                .map_err(|_| self.wrong(key, "a height and a width", found)),
            _ => self.size(key, default).map(|side| [side, side]),
        }
    }

    pub(crate) fn integer(&self, key: &str) -> Result<Option<i64>, GraphError> {
        self.get(key).map(|found| found.as_i64().ok_or_else(|| self.wrong(key, "a whole number", found))).transpose()
    }

    /// The id of a token.
    pub(crate) fn token(&self, key: &str) -> Result<Option<usize>, GraphError> {
        let id = |id| usize::try_from(id).map_err(|_| self.fault(key, "a token's id is not below 0".into()));
        self.integer(key)?.map(id).transpose()
    }

    /// So many heads over `width`, which the config calls `whole`.
    pub(crate) fn heads(&self, key: &str, default: usize, whole: &str, width: usize) -> Result<Heads, GraphError> {
        let count = self.size(key, default)?;
        if !width.is_multiple_of(count) {
            return Err(self.fault(key, format!("{whole} {width} does not divide by {count} heads")));
        }
        Ok(Heads { query: count, key_value: count, dim: width / count })
    }

    /// A finite number above 0.
    pub(crate) fn positive(&self, key: &str, default: f32) -> Result<f32, GraphError> {
        match self.get(key) {
            None => Ok(default),
            Some(found) => match found.as_f64() {
                Some(number) if number > 0.0 && (number as f32).is_finite() => Ok(number as f32),
                _ => Err(self.wrong(key, "a number above 0", found)),
            },
        }
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, GraphError> {
        match self.get(key) {
            None => Ok(default),
            Some(found) => found.as_bool().ok_or_else(|| self.wrong(key, "true or false", found)),
        }
    }

    pub(crate) fn text(&self, key: &str, default: &'a str) -> Result<&'a str, GraphError> {
        match self.get(key) {
            None => Ok(default),
            Some(found) => found.as_str().ok_or_else(|| self.wrong(key, "a text", found)),
        }
    }

    pub(crate) fn activation(&self, key: &str, default: &'a str) -> Result<ActivationKind, GraphError> {
        let name = self.text(key, default)?;
        ActivationKind::from_config(name)
            .ok_or_else(|| self.fault(key, format!("activation `{name}` is not supported")))
    }

    /// T5's spelling: whether two input matrices are multiplied, one through the activation, and which that is.
    pub(crate) fn gated_activation(&self, key: &str, default: &'a str) -> Result<(bool, ActivationKind), GraphError> {
        let whole = self.text(key, default)?;
        let (gated, name) = match whole.strip_prefix("gated-") {
            // What is called gelu there is its tanh form.
            Some("gelu") => (true, "gelu_new"),
            Some(name) => (true, name),
            None => (false, whole),
        };
        let kind = ActivationKind::from_config(name);
        Ok((gated, kind.ok_or_else(|| self.fault(key, format!("`{whole}` is not supported")))?))
    }

    /// Rotary embedding in both spellings: `rope_theta` + `rope_scaling` (4.x), `rope_parameters` (5.x).
    pub(crate) fn rope(&self, theta: f32, max_positions: usize) -> Result<Rope, GraphError> {
        let nested = self.object("rope_parameters")?;
        let theta = nested.positive("rope_theta", self.positive("rope_theta", theta)?)?;
        let key = if nested.get("rope_type").is_some() { "rope_parameters" } else { "rope_scaling" };
        let scaling = self.object(key)?;
        let kind = scaling.text("rope_type", scaling.text("type", "default")?)?;
        let scaling = match kind {
            "default" => None,
            "linear" => Some(RopeScaling::Linear { factor: scaling.positive("factor", 1.0)? }),
            "llama3" => Some(RopeScaling::Llama3 {
                factor: scaling.positive("factor", 8.0)?,
                low_freq_factor: scaling.positive("low_freq_factor", 1.0)?,
                high_freq_factor: scaling.positive("high_freq_factor", 4.0)?,
                original_max_positions: scaling.positive("original_max_position_embeddings", 8192.0)?,
            }),
            other => return Err(scaling.fault("rope_type", format!("rope scaling `{other}` is not supported"))),
        };
        Ok(Rope { theta, max_positions, scaling })
    }
}
