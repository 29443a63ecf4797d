//! The header of one safetensors file: read, checked beyond what the format's own crate checks, never the data behind it.
use super::fault::HeaderFault;
use super::json::Strict;
use graphs::DType;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeMap;

/// What the format allows a header, in bytes.
pub(crate) const MAX_HEADER: u64 = 100_000_000;
pub(crate) const MAX_TENSORS: usize = 200_000;
pub(crate) const MAX_NAME: usize = 1024;
pub(crate) const MAX_RANK: usize = 8;
const LENGTH_BYTES: u64 = 8;
pub(crate) const DTYPES: [DType; 8] = [
    DType::Float32,
    DType::Float16,
    DType::Bfloat16,
    DType::Int32,
    DType::Int64,
    DType::Int8,
    DType::Uint8,
    DType::Bool,
];

/// One tensor of one file; `offset` and `bytes` lie inside the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// Names of strangers, short and without control characters.
pub(crate) fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(80).flat_map(char::escape_debug).collect();
    if name.chars().nth(80).is_some() {
        text.push('…');
    }
    text
}

/// Bytes of the header's JSON, from the first eight (or fewer) bytes of a file of `file_bytes`.
pub(crate) fn header_bytes(start: &[u8], file_bytes: u64) -> Result<u64, HeaderFault> {
    if file_bytes == 0 {
        return Err(HeaderFault::Empty);
    }
    let Ok(length) = <[u8; 8]>::try_from(start) else {
        return Err(HeaderFault::HeaderCut { found: file_bytes, wanted: LENGTH_BYTES });
    };
    let text = start.to_ascii_lowercase();
    if text == b"version " {
        return Err(HeaderFault::LfsPointer);
    }
    if text.starts_with(b"<html") || text.starts_with(b"<!doc") {
        return Err(HeaderFault::WebPage);
    }
    let header = u64::from_le_bytes(length);
    if header > MAX_HEADER {
        return Err(HeaderFault::HeaderSize { found: header });
    }
    match file_bytes - LENGTH_BYTES {
        rest if rest < header => Err(HeaderFault::HeaderCut { found: file_bytes, wanted: LENGTH_BYTES + header }),
        _ => Ok(header),
    }
}

/// Parses and checks the header's JSON, of a file of `file_bytes`; the tensors by name.
pub(crate) fn parse(header: &[u8], file_bytes: u64) -> Result<BTreeMap<String, Located>, HeaderFault> {
    if header.first() != Some(&b'{') {
        return Err(HeaderFault::NotObject);
    }
    let mut state = State::default();
    let mut deserializer = serde_json::Deserializer::from_slice(header);
    let parsed = (&mut state).deserialize(&mut deserializer).and_then(|()| deserializer.end());
    if let Err(cause) = parsed {
        return Err(match (state.fault, state.current) {
            (Some(fault), _) => fault,
            (None, Some(tensor)) => HeaderFault::Entry { tensor, cause },
            (None, None) => HeaderFault::Json { cause },
        });
    }
    let data_start = LENGTH_BYTES + header.len() as u64;
    let located = state
        .tensors
        .into_iter()
        .map(|(name, entry)| entry.locate(&name, data_start).map(|located| (name, located)))
        .collect::<Result<BTreeMap<_, _>, _>>()?;
    check_cover(&located, data_start, file_bytes)?;
    Ok(located)
}

/// The data must be covered exactly: no overlap, no gap, nothing past the end, nothing left over.
fn check_cover(tensors: &BTreeMap<String, Located>, data_start: u64, file_bytes: u64) -> Result<(), HeaderFault> {
    let mut order: Vec<(&String, &Located)> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| tensor.offset);
    let (mut wanted, mut before) = (data_start, "");
    let mut cut = None;
    for (name, tensor) in order {
        let data = |position: u64| position - data_start;
        if tensor.offset > wanted {
            let (found, wanted) = (data(tensor.offset), data(wanted));
            return Err(HeaderFault::Gap { tensor: shown(name), found, wanted });
        }
        if tensor.offset < wanted {
            let (found, wanted) = (data(tensor.offset), data(wanted));
            return Err(HeaderFault::Overlap { tensor: shown(name), before: shown(before), found, wanted });
        }
        // `locate` has shown that the sum fits.
        wanted = tensor.offset + tensor.bytes;
        before = name;
        if wanted > file_bytes && cut.is_none() {
            cut = Some(shown(name));
        }
    }
    match cut {
        Some(tensor) => Err(HeaderFault::Truncated { tensor, found: file_bytes, wanted }),
        None if tensors.is_empty() => Err(HeaderFault::NoTensors),
        None if wanted < file_bytes => Err(HeaderFault::Trailing { found: file_bytes, wanted }),
        None => Ok(()),
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Entry {
    fn locate(self, name: &str, data_start: u64) -> Result<Located, HeaderFault> {
        let tensor = shown(name);
        let (begin, end) = self.data_offsets;
        let Some(dtype) = DTYPES.into_iter().find(|dtype| dtype.safetensors() == self.dtype) else {
            return Err(HeaderFault::Dtype { tensor, found: shown(&self.dtype) });
        };
        if self.shape.len() > MAX_RANK {
            return Err(HeaderFault::Rank { tensor, found: self.shape.len() });
        }
        if self.shape.contains(&0) {
            return Err(HeaderFault::ZeroSize { tensor, shape: self.shape });
        }
        let element = dtype.bits() as u64 / 8;
        let wanted = self.shape.iter().try_fold(element, |product, dimension| product.checked_mul(*dimension));
        let dimensions: Option<Vec<usize>> = self.shape.iter().map(|size| usize::try_from(*size).ok()).collect();
        let (Some(wanted), Some(shape)) = (wanted, dimensions) else {
            return Err(HeaderFault::Overflow { tensor, shape: self.shape });
        };
        let Some(found) = end.checked_sub(begin) else {
            return Err(HeaderFault::Backwards { tensor, begin, end });
        };
        if found != wanted {
            let dtype = dtype.safetensors();
            return Err(HeaderFault::Size { tensor, dtype, shape: self.shape, found, wanted });
        }
        if end.checked_add(data_start).is_none() {
            return Err(HeaderFault::Overflow { tensor, shape: self.shape });
        }
        Ok(Located { dtype, shape, offset: data_start + begin, bytes: wanted })
    }
}

/// Where the parser is, so that an error deep in an entry can name its tensor.
#[derive(Default)]
struct State {
    tensors: BTreeMap<String, Entry>,
    current: Option<String>,
    fault: Option<HeaderFault>,
}

impl State {
    fn refuse<E: de::Error>(&mut self, fault: HeaderFault) -> E {
        self.fault = Some(fault);
        E::custom("refused")
    }
}

impl<'de> DeserializeSeed<'de> for &mut State {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut State {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let mut metadata_seen = false;
        while let Some(name) = entries.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut metadata_seen, true) {
                    return Err(self.refuse(HeaderFault::Duplicate { tensor: name }));
                }
                self.check_metadata(entries.next_value_seed(Strict)?)?;
                continue;
            }
            if let Some(reason) = bad_name(&name) {
                return Err(self.refuse(HeaderFault::Name { tensor: shown(&name), reason }));
            }
            if self.tensors.contains_key(&name) {
                entries.next_value::<IgnoredAny>()?;
                return Err(self.refuse(HeaderFault::Duplicate { tensor: shown(&name) }));
            }
            if self.tensors.len() == MAX_TENSORS {
                return Err(self.refuse(HeaderFault::TooMany));
            }
            self.current = Some(shown(&name));
            let entry = entries.next_value()?;
            self.current = None;
            self.tensors.insert(name, entry);
        }
        Ok(())
    }
}

impl State {
    fn check_metadata<E: de::Error>(&mut self, metadata: Value) -> Result<(), E> {
        let Value::Object(entries) = metadata else {
            let found = super::json::kind(&metadata);
            return Err(E::custom(format_args!("`__metadata__` is {found}, wanted an object")));
        };
        match entries.iter().find(|(_, value)| !value.is_string()) {
            Some((key, value)) => {
                Err(self.refuse(HeaderFault::Metadata { key: shown(key), found: super::json::kind(value) }))
            }
            None => Ok(()),
        }
    }
}

pub(crate) fn bad_name(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("which is empty")
    } else if name.len() > MAX_NAME {
        Some("which is longer than 1024 bytes")
    } else if name.contains(['/', '\\']) || name == "." || name == ".." {
        Some("which looks like a path")
    } else if name.contains(char::is_control) {
        Some("which holds control characters")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn read(file: &[u8]) -> Result<BTreeMap<String, Located>, HeaderFault> {
        let size = file.len() as u64;
        let header = header_bytes(&file[..file.len().min(8)], size)? as usize;
        parse(&file[8..8 + header], size)
    }

    #[test]
    fn tensors_are_placed_in_the_file() {
        let header = r#"{"b":{"dtype":"F16","shape":[2,3],"data_offsets":[4,16]},"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  "#;
        let tensors = read(&file(header, 16)).unwrap();
        let start = 8 + header.len() as u64;
        assert_eq!(tensors["a"], Located { dtype: DType::Float32, shape: vec![], offset: start, bytes: 4 });
        assert_eq!(tensors["b"], Located { dtype: DType::Float16, shape: vec![2, 3], offset: start + 4, bytes: 12 });
    }

    #[test]
    fn every_cut_is_refused() {
        let whole = file(r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#, 9);
        for length in 0..whole.len() {
            let fault = read(&whole[..length]).unwrap_err();
            assert!(fault.hint().unwrap().contains("cut short"), "{length}: {fault}");
        }
        read(&whole).unwrap();
    }

    #[test]
    fn too_many_tensors_are_refused() {
        let entries: Vec<String> = (0..=MAX_TENSORS)
            .map(|index| format!(r#""t{index}":{{"dtype":"U8","shape":[1],"data_offsets":[{index},{}]}}"#, index + 1))
            .collect();
        let header = format!("{{{}}}", entries.join(","));
        assert_eq!(read(&file(&header, entries.len())).unwrap_err().to_string(), "more than 200000 tensors");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        /// Mutated files never panic, and what we accept, the format's own crate accepts with the same places.
        #[test]
        fn mutations_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..5)) {
            let mut bytes = file(
                r#"{"__metadata__":{"x":"y"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}}"#,
                16,
            );
            for (place, byte, kind) in changes {
                let place = place.index(bytes.len());
                match kind {
                    0 => bytes[place] = byte,
                    1 => bytes.insert(place, b"0123456789{}[],:\"-e."[byte as usize % 20]),
                    _ => { bytes.remove(place); }
                }
            }
            if let Ok(tensors) = read(&bytes) {
                let theirs = SafeTensors::deserialize(&bytes).unwrap();
                prop_assert_eq!(theirs.len(), tensors.len());
                for (name, located) in &tensors {
                    let view = theirs.tensor(name).unwrap();
                    prop_assert_eq!(view.data().as_ptr() as usize - bytes.as_ptr() as usize, located.offset as usize);
                    prop_assert_eq!(view.shape(), &located.shape[..]);
                    prop_assert_eq!(view.data().len() as u64, located.bytes);
                }
            }
        }
    }
}
