//! The bytes of weights and of constants made up by the lowering, all alive until the engine is built.
use crate::builder::ConstantPlace;
use graphs::DType;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tensorrt_sys::MappedFile;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ConstantError {
    #[error("weight `{key}` is in no file")]
    Missing { key: String },
    #[error("`{file}` has {found} bytes, weight `{key}` ends at {wanted}", file = .file.display())]
    Short { key: String, file: PathBuf, wanted: u64, found: usize },
    #[error(transparent)]
    Map(#[from] tensorrt_sys::Error),
}

/// One weight: bytes as stored, their type and stored shape.
#[derive(Clone, Copy)]
pub struct Constant<'w> {
    pub bytes: &'w [u8],
    pub dtype: DType,
    pub shape: &'w [usize],
}

pub struct Constants {
    files: BTreeMap<PathBuf, MappedFile>,
    places: BTreeMap<String, ConstantPlace>,
    computed: Link,
}

/// A list that only grows, so that what is in it can be borrowed for as long as the list.
#[derive(Default)]
struct Link {
    bytes: OnceCell<Vec<u8>>,
    next: OnceCell<Box<Link>>,
}

impl Link {
    /// The list's own copy of `bytes`, equal ones shared.
    fn intern(&self, bytes: Vec<u8>) -> &[u8] {
        let mut link = self;
        loop {
            let held = link.bytes.get_or_init(|| bytes.clone());
            if *held == bytes {
                return held;
            }
            link = link.next.get_or_init(Box::default);
        }
    }
}

impl Constants {
    /// Maps every file that `places` names.
    ///
    /// # Errors
    /// A file that cannot be mapped or is too short.
    pub fn open(places: BTreeMap<String, ConstantPlace>) -> Result<Constants, ConstantError> {
        let mut files = BTreeMap::new();
        for (key, place) in &places {
            if !files.contains_key(&place.file) {
                files.insert(place.file.clone(), MappedFile::open(&place.file)?);
            }
            let found = files.get(&place.file).map_or(0, |file| file.bytes().len());
            let wanted = place.offset.saturating_add(place.bytes);
            if wanted > found as u64 {
                return Err(ConstantError::Short { key: key.clone(), file: place.file.clone(), wanted, found });
            }
        }
        Ok(Constants { files, places, computed: Link::default() })
    }

    /// # Errors
    /// A weight that no file holds.
    pub fn get(&self, key: &str) -> Result<Constant<'_>, ConstantError> {
        let missing = || ConstantError::Missing { key: key.into() };
        let place = self.places.get(key).ok_or_else(missing)?;
        let file = self.files.get(&place.file).ok_or_else(missing)?;
        let (start, end) = (place.offset as usize, (place.offset + place.bytes) as usize);
        let bytes = file.bytes().get(start..end).ok_or_else(missing)?;
        Ok(Constant { bytes, dtype: place.dtype, shape: &place.shape })
    }

    /// Numbers in the network's type.
    pub(super) fn floats(&self, dtype: DType, values: &[f32]) -> &[u8] {
        self.computed.intern(quant::from_f32(dtype, values))
    }

    pub(super) fn ints(&self, values: &[i32]) -> &[u8] {
        self.computed.intern(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::Link;

    #[test]
    fn the_list_keeps_and_shares() {
        let list = Link::default();
        let (one, two, again) = (list.intern(vec![1]), list.intern(vec![2]), list.intern(vec![1]));
        assert_eq!((one, two), (&[1u8][..], &[2u8][..]));
        assert!(std::ptr::eq(one, again));
    }
}
