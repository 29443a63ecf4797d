//! The zip around a PyTorch `.bin` file: its directory, read with strict bounds; never the data of a record.
//! Own code, because only stored records with a directory at the very end are wanted: a zip crate would bring
//! decompressors and leniency (archives inside other files, records that overlap) that are refused here.
use super::bin_fault::BinFault;
use super::header::{MAX_NAME, MAX_TENSORS, shown};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Each tensor has at most one record, and a few tell versions.
const MAX_RECORDS: u64 = MAX_TENSORS as u64 + 64;
const MAX_DIRECTORY: u64 = 64 << 20;
const LOCAL: [u8; 4] = *b"PK\x03\x04";
const CENTRAL: [u8; 4] = *b"PK\x01\x02";
const END: [u8; 4] = *b"PK\x05\x06";
const LARGE_END: [u8; 4] = *b"PK\x06\x06";
const LARGE_LOCATOR: [u8; 4] = *b"PK\x06\x07";
const LOCAL_BYTES: u64 = 30;
const CENTRAL_BYTES: u64 = 46;
const END_BYTES: u64 = 22;
const LARGE_END_BYTES: u64 = 56;
const LOCATOR_BYTES: u64 = 20;
/// Where a 32-bit field holds this, the value is in a 64-bit one.
const ELSEWHERE: u64 = u32::MAX as u64;
const LARGE_EXTRA: u64 = 1;

/// One stored record; `offset` of its data and `bytes` lie inside the file, before the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// A whole number of `size` bytes, little-endian; 0 where the bytes end before it, which no caller lets happen.
fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    let field = bytes.get(at..at.saturating_add(size)).unwrap_or_default();
    field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

pub(crate) fn read(file: &File, offset: u64, bytes: u64) -> Result<Vec<u8>, BinFault> {
    let mut buffer = vec![0; bytes as usize];
    file.read_exact_at(&mut buffer, offset).map_err(BinFault::Read)?;
    Ok(buffer)
}

/// The records of a file of `file_bytes` by name.
pub(crate) fn records(file: &File, file_bytes: u64) -> Result<BTreeMap<String, Record>, BinFault> {
    recognize(&read(file, 0, file_bytes.min(512))?)?;
    let (start, bytes, count) = directory(file, file_bytes)?;
    let text = read(file, start, bytes)?;
    let mut records = BTreeMap::new();
    let mut rest = &text[..];
    for _ in 0..count {
        let (name, record, tail) = central(rest)?;
        rest = tail;
        if records.insert(name.to_owned(), record).is_some() {
            return Err(BinFault::RecordTwice { record: shown(name) });
        }
    }
    if !rest.is_empty() {
        return Err(BinFault::DirectoryLeft { bytes: rest.len() });
    }
    place(file, &mut records, start)?;
    Ok(records)
}

/// What else people have under such a name, by the first bytes of the file.
fn recognize(start: &[u8]) -> Result<(), BinFault> {
    let text = start.get(..8).unwrap_or(start).to_ascii_lowercase();
    match start {
        [] => Err(BinFault::Empty),
        _ if start.starts_with(&LOCAL) => Ok(()),
        _ if text == b"version " => Err(BinFault::LfsPointer),
        _ if text.starts_with(b"<html") || text.starts_with(b"<!doc") => Err(BinFault::WebPage),
        _ if start.get(257..262) == Some(b"ustar") => Err(BinFault::OldTar),
        [0x80, _, ..] => Err(BinFault::OldPickle),
        _ => Err(BinFault::NotZip),
    }
}

/// Start, bytes and records of the directory, which ends where the end records begin.
fn directory(file: &File, file_bytes: u64) -> Result<(u64, u64, u64), BinFault> {
    let Some(end) = file_bytes.checked_sub(END_BYTES) else { return Err(BinFault::NoDirectory) };
    let tail = read(file, end, END_BYTES)?;
    if !tail.starts_with(&END) || number(&tail, 20, 2) != 0 {
        return Err(BinFault::NoDirectory);
    }
    let mut disks = [number(&tail, 4, 2), number(&tail, 6, 2)];
    let (mut here, mut count) = (number(&tail, 8, 2), number(&tail, 10, 2));
    let (mut bytes, mut start, mut limit) = (number(&tail, 12, 4), number(&tail, 16, 4), end);
    let locator = match end.checked_sub(LOCATOR_BYTES + LARGE_END_BYTES) {
        Some(large) => Some((large, read(file, end - LOCATOR_BYTES, LOCATOR_BYTES)?)),
        None => None,
    };
    if let Some((large, locator)) = locator.filter(|(_, locator)| locator.starts_with(&LARGE_LOCATOR)) {
        let record = read(file, large, LARGE_END_BYTES)?;
        if number(&locator, 8, 8) != large || !record.starts_with(&LARGE_END) || number(&record, 4, 8) != 44 {
            return Err(BinFault::LargeEnd);
        }
        disks = [number(&record, 16, 4), number(&record, 20, 4)];
        (here, count) = (number(&record, 24, 8), number(&record, 32, 8));
        (bytes, start, limit) = (number(&record, 40, 8), number(&record, 48, 8), large);
    }
    if disks != [0, 0] || here != count {
        return Err(BinFault::Disks);
    }
    if count > MAX_RECORDS {
        return Err(BinFault::TooManyRecords { found: count, limit: MAX_RECORDS });
    }
    if bytes > MAX_DIRECTORY || count.saturating_mul(CENTRAL_BYTES) > bytes {
        return Err(BinFault::DirectorySize { found: bytes, records: count });
    }
    match start.checked_add(bytes) {
        Some(found) if found == limit => Ok((start, bytes, count)),
        _ => Err(BinFault::DirectoryPlace { start, bytes, wanted: limit }),
    }
}

/// The first entry of a directory: its name, its record with the local header's offset, and what follows.
fn central(bytes: &[u8]) -> Result<(&str, Record, &[u8]), BinFault> {
    let cut = BinFault::DirectoryCut;
    let (fixed, rest) = bytes.split_at_checked(CENTRAL_BYTES as usize).ok_or(cut)?;
    if !fixed.starts_with(&CENTRAL) {
        return Err(BinFault::DirectoryCut);
    }
    let [name, extra, comment] = [28, 30, 32].map(|at| number(fixed, at, 2) as usize);
    let (name, rest) = rest.split_at_checked(name).ok_or(BinFault::DirectoryCut)?;
    let (extra, rest) = rest.split_at_checked(extra).ok_or(BinFault::DirectoryCut)?;
    let (_, rest) = rest.split_at_checked(comment).ok_or(BinFault::DirectoryCut)?;
    let name = match std::str::from_utf8(name) {
        Ok(name) if !name.is_empty() && name.len() <= MAX_NAME && !name.contains(char::is_control) => name,
        _ => return Err(BinFault::RecordName { record: shown(&String::from_utf8_lossy(name)) }),
    };
    let record = || shown(name);
    if number(fixed, 8, 2) & 1 != 0 {
        return Err(BinFault::Encrypted { record: record() });
    }
    let (method, packed, bytes) = (number(fixed, 10, 2), number(fixed, 20, 4), number(fixed, 24, 4));
    if method != 0 {
        return Err(BinFault::Compressed { record: record(), method });
    }
    let mut values = [bytes, packed, number(fixed, 42, 4)];
    let mut large = extra_field(extra);
    for value in values.iter_mut().filter(|value| **value == ELSEWHERE) {
        let (field, tail) = large.split_at_checked(8).ok_or_else(|| BinFault::LargeExtra { record: record() })?;
        (*value, large) = (number(field, 0, 8), tail);
    }
    let [bytes, packed, offset] = values;
    if bytes != packed {
        return Err(BinFault::RecordSizes { record: record(), packed, bytes });
    }
    Ok((name, Record { offset, bytes }, rest))
}

/// The 64-bit values of an entry's extra fields; empty where there are none.
fn extra_field(mut extra: &[u8]) -> &[u8] {
    while let Some((head, rest)) = extra.split_at_checked(4) {
        let bytes = number(head, 2, 2) as usize;
        let Some((field, rest)) = rest.split_at_checked(bytes) else { break };
        if number(head, 0, 2) == LARGE_EXTRA {
            return field;
        }
        extra = rest;
    }
    &[]
}

/// Moves each record's offset from its local header to its data; records must not overlap nor reach the directory.
fn place(file: &File, records: &mut BTreeMap<String, Record>, limit: u64) -> Result<(), BinFault> {
    let mut order: Vec<(&String, &mut Record)> = records.iter_mut().collect();
    order.sort_by_key(|(_, record)| record.offset);
    let (mut free, mut before) = (0, String::new());
    for (name, record) in order {
        let shown_name = shown(name);
        let outside = |record: &Record| BinFault::RecordOutside {
            record: shown(name),
            offset: record.offset,
            bytes: record.bytes,
            limit,
        };
        if record.offset < free {
            return Err(BinFault::RecordOverlap { record: shown_name, before });
        }
        let head_bytes = LOCAL_BYTES + name.len() as u64;
        if record.offset.checked_add(head_bytes).is_none_or(|end| end > limit) {
            return Err(outside(record));
        }
        let head = read(file, record.offset, head_bytes)?;
        let named = head.get(LOCAL_BYTES as usize..) == Some(name.as_bytes());
        if !head.starts_with(&LOCAL) || number(&head, 26, 2) != name.len() as u64 || !named {
            return Err(BinFault::LocalHeader { record: shown_name, offset: record.offset });
        }
        let data = record.offset + head_bytes + number(&head, 28, 2);
        match data.checked_add(record.bytes) {
            Some(end) if end <= limit => free = end,
            _ => return Err(outside(record)),
        }
        record.offset = data;
        before = shown_name;
    }
    Ok(())
}
