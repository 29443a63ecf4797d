//! What tells one model from another without reading all of it.
use crate::source::ModelSource;
use quant::{QuantError, Source};
use sha2::{Digest, Sha256};

/// Bytes that are read of each tensor, from its middle on.
const SAMPLE: usize = 256;

/// Of the config, and of every tensor its name, type, shape and a few values.
///
/// # Errors
/// A tensor that cannot be read.
pub fn fingerprint(source: &ModelSource) -> Result<String, QuantError> {
    let mut hash = Sha256::new();
    for checkpoint in source.checkpoints() {
        hash.update(checkpoint.config().to_string());
    }
    let mut names: Vec<&String> = source.coverage().found.keys().collect();
    names.sort_unstable();
    for name in names {
        let Some(entry) = source.entry(name) else { continue };
        hash.update(format!("\n{name} {} {:?} ", entry.dtype, entry.shape));
        let bytes = entry.dtype.bytes(entry.shape.iter().product());
        let mut sample = vec![0; bytes.min(SAMPLE)];
        let offset = (bytes - sample.len()) / 2;
        source
            .read(name, offset as u64, &mut sample)
            .map_err(|source| QuantError::Read { tensor: name.clone(), source })?;
        hash.update(&sample);
    }
    Ok(hex(&hash.finalize()))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
