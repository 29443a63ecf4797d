//! Writes PyTorch's zip files byte by byte, right ones and wrong ones.
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// A record of the zip; `claimed` overrides the sizes in the directory: as stored, as unpacked.
#[derive(Clone)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) data: Vec<u8>,
    /// Zeros after the data, which take no room on the disk.
    pub(crate) hole: u64,
    pub(crate) method: u16,
    pub(crate) flags: u16,
    pub(crate) claimed: Option<[u64; 2]>,
}

pub(crate) fn record(name: &str, data: impl Into<Vec<u8>>) -> Record {
    // PyTorch's flags: UTF-8 names, sizes after the data.
    Record { name: name.into(), data: data.into(), hole: 0, method: 0, flags: 0x808, claimed: None }
}

/// Writes a zip as PyTorch does: data at multiples of 64, 64-bit fields where `large` or where they must be.
pub(crate) fn write_zip(path: &Path, records: &[Record], large: bool) {
    let mut file = File::create(path).unwrap();
    let mut directory = Vec::new();
    let mut at = 0u64;
    for Record { name, data, hole, method, flags, claimed } in records {
        let head = 30 + name.len() as u64 + 4;
        let padding = (64 - (at + head) % 64) % 64;
        let mut local = b"PK\x03\x04\0\0".to_vec();
        local.extend([flags.to_le_bytes(), method.to_le_bytes()].concat());
        local.extend([0; 16]);
        local.extend([(name.len() as u16).to_le_bytes(), (padding as u16 + 4).to_le_bytes()].concat());
        local.extend([name.as_bytes(), b"FB", &(padding as u16).to_le_bytes()].concat());
        local.extend(vec![b'Z'; padding as usize]);
        file.write_all(&local).unwrap();
        file.write_all(data).unwrap();
        let bytes = data.len() as u64 + hole;
        let [packed, unpacked] = claimed.unwrap_or([bytes; 2]);
        let mut extra = Vec::new();
        let mut short = |value: u64| match u32::try_from(value) {
            Ok(value) if value < u32::MAX && !large => value,
            _ => {
                extra.extend(value.to_le_bytes());
                u32::MAX
            }
        };
        let sizes = [short(unpacked), short(packed), short(at)];
        if !extra.is_empty() {
            extra = [&1u16.to_le_bytes()[..], &(extra.len() as u16).to_le_bytes(), &extra].concat();
        }
        directory.extend(b"PK\x01\x02\0\0\0\0");
        directory.extend([flags.to_le_bytes(), method.to_le_bytes()].concat());
        directory.extend([0; 8]);
        directory.extend([sizes[1].to_le_bytes(), sizes[0].to_le_bytes()].concat());
        directory.extend([(name.len() as u16).to_le_bytes(), (extra.len() as u16).to_le_bytes()].concat());
        directory.extend([0; 10]);
        directory.extend(sizes[2].to_le_bytes());
        directory.extend([name.as_bytes(), &extra].concat());
        let descriptor =
            [b"PK\x07\x08\0\0\0\0".as_slice(), &(bytes as u32).to_le_bytes(), &(bytes as u32).to_le_bytes()];
        at = file.seek(SeekFrom::Current(*hole as i64)).unwrap();
        file.write_all(&descriptor.concat()).unwrap();
        at += 16;
    }
    let (bytes, count) = (directory.len() as u64, records.len() as u64);
    if large || at > u64::from(u32::MAX) {
        let end = at + bytes;
        directory.extend(b"PK\x06\x06");
        directory.extend([&44u64.to_le_bytes()[..], &[0; 12]].concat());
        directory.extend([count, count, bytes, at].map(u64::to_le_bytes).concat());
        directory.extend([&b"PK\x06\x07\0\0\0\0"[..], &end.to_le_bytes(), &1u32.to_le_bytes()].concat());
    }
    let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    directory.extend(b"PK\x05\x06\0\0\0\0");
    directory.extend([(count as u16).to_le_bytes(), (count as u16).to_le_bytes()].concat());
    directory.extend([short(bytes), short(at), [0; 4]].concat());
    directory.truncate(directory.len() - 2);
    file.write_all(&directory).unwrap();
}

/// One tensor of a state dict.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) storage: &'static str,
    pub(crate) key: String,
    pub(crate) elements: i64,
    pub(crate) first: i64,
    pub(crate) shape: Vec<i64>,
    pub(crate) stride: Vec<i64>,
}

pub(crate) fn contiguous(shape: &[i64]) -> Vec<i64> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

pub(crate) fn tensor(name: &str, storage: &'static str, key: &str, shape: &[i64]) -> Tensor {
    let (shape, stride) = (shape.to_vec(), contiguous(shape));
    Tensor { name: name.into(), storage, key: key.into(), elements: shape.iter().product(), first: 0, shape, stride }
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

pub(crate) fn int(value: i64) -> Vec<u8> {
    match value {
        0..=0xff => vec![b'K', value as u8],
        0x100..=0xffff => [b"M".as_slice(), &(value as u16).to_le_bytes()].concat(),
        _ => match i32::try_from(value) {
            Ok(value) => [b"J".as_slice(), &value.to_le_bytes()].concat(),
            Err(_) => [b"\x8a\x08".as_slice(), &value.to_le_bytes()].concat(),
        },
    }
}

pub(crate) fn ints(values: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|value| int(*value)).collect(), b"t".to_vec()].concat()
}

/// What stands for a tensor in a pickle, as `torch._utils` names it.
pub(crate) fn value(tensor: &Tensor) -> Vec<u8> {
    let Tensor { storage, key, elements, first, shape, stride, .. } = tensor;
    let parts = [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        format!("ctorch\n{storage}\n").into_bytes(),
        text(key),
        text("cpu"),
        int(*elements),
        b"tQ".to_vec(),
        int(*first),
        ints(shape),
        ints(stride),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ];
    parts.concat()
}

/// A pickle of protocol 2 around what makes one dict.
pub(crate) fn dict(items: &[u8]) -> Vec<u8> {
    [b"\x80\x02}(".as_slice(), items, b"u."].concat()
}

pub(crate) fn state_dict(tensors: &[Tensor]) -> Vec<u8> {
    let items: Vec<u8> = tensors.iter().flat_map(|tensor| [text(&tensor.name), value(tensor)].concat()).collect();
    dict(&items)
}

/// The records that PyTorch writes, in its order.
pub(crate) fn records(pickle: Vec<u8>, storages: &[(&str, Vec<u8>)]) -> Vec<Record> {
    let mut records = vec![record("m/data.pkl", pickle), record("m/byteorder", "little")];
    records.extend(storages.iter().map(|(key, data)| record(&format!("m/data/{key}"), data.clone())));
    records.push(record("m/version", "3\n"));
    records
}
