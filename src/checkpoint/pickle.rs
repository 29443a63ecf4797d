//! A pickle machine that knows the opcodes of state dicts and no others. It calls nothing: what names mean is said in
//! `state_dict.rs`. Values are small and point into arenas, so that no pickle makes it recurse or copy without bound.
use super::bin_fault::BinFault;
use super::state_dict::{Global, Storage, Tensor};

/// More than any state dict's, and little enough to be held in memory.
pub(crate) const MAX_PICKLE: u64 = 32 << 20;
/// A tensor takes some 35 opcodes; each takes at most some 50 bytes of memory.
pub(super) const MAX_STEPS: usize = 4 << 20;
const MAX_STACK: usize = 64 << 10;
/// A part of the pickle's bytes, or of the tuples' arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    start: u32,
    end: u32,
}

impl Span {
    pub(super) fn new(start: usize, end: usize) -> Span {
        // MAX_PICKLE and MAX_STEPS are far below.
        Span { start: start as u32, end: end as u32 }
    }

    pub(super) fn of<T>(self, all: &[T]) -> &[T] {
        all.get(self.start as usize..self.end as usize).unwrap_or_default()
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    None,
    Bool,
    Int(i64),
    Text(Span),
    Tuple(Span),
    Dict(u32),
    Global(Global),
    Storage(u32),
    Tensor(u32),
}

impl Value {
    pub(super) fn kind(self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool => "a boolean",
            Value::Int(_) => "a number",
            Value::Text(_) => "a text",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dict",
            Value::Global(_) => "a name",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

#[derive(Default)]
pub(super) struct Machine<'p> {
    bytes: &'p [u8],
    at: usize,
    /// Where the opcode being run lies.
    pub(super) opcode: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: Vec<Value>,
    pub(super) tuples: Vec<Value>,
    pub(super) dicts: Vec<Vec<(Value, Value)>>,
    pub(super) storages: Vec<Storage>,
    pub(super) tensors: Vec<Tensor>,
}

impl<'p> Machine<'p> {
    pub(super) fn new(bytes: &'p [u8]) -> Machine<'p> {
        Machine { bytes, ..Machine::default() }
    }

    /// Runs one opcode; the result where it is the last.
    pub(super) fn step(&mut self) -> Result<Option<Value>, BinFault> {
        self.opcode = self.at;
        let code = self.number(1)?;
        if self.opcode == 0 && code != 0x80 {
            return Err(BinFault::NoPickle);
        }
        match code as u8 {
            0x80 => match self.number(1)? {
                2 => {}
                found => return Err(BinFault::Protocol { found }),
            },
            b'}' => self.new_dict()?,
            b')' => self.push(Value::Tuple(Span::new(0, 0)))?,
            b'(' => self.marks.push(self.stack.len()),
            b't' => {
                let start = self.mark()?;
                self.tuple(start)?;
            }
            code @ 0x85..=0x87 => {
                let count = usize::from(code - 0x84);
                let start = self.stack.len().checked_sub(count).ok_or_else(|| self.underflow())?;
                self.tuple(start)?;
            }
            b'N' => self.push(Value::None)?,
            0x88 | 0x89 => self.push(Value::Bool)?,
            b'K' => self.int(1)?,
            b'M' => self.int(2)?,
            b'J' => {
                let value = self.number(4)? as u32 as i32;
                self.push(Value::Int(value.into()))?;
            }
            0x8a => {
                let size = self.number(1)? as usize;
                if size > 8 {
                    return Err(BinFault::LongInt { at: self.opcode, bytes: size });
                }
                let value = self.number(size)?;
                let unused = 64 - 8 * size as u32;
                let signed = if size == 0 { 0 } else { ((value << unused) as i64) >> unused };
                self.push(Value::Int(signed))?;
            }
            b'X' => {
                let size = self.number(4)? as usize;
                let span = self.text(size)?;
                self.push(Value::Text(span))?;
            }
            b'c' => self.global()?,
            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            b'h' => self.get(1)?,
            b'j' => self.get(4)?,
            b's' => {
                let start = self.stack.len().checked_sub(2).ok_or_else(|| self.underflow())?;
                self.set_items(start)?;
            }
            b'u' => {
                let start = self.mark()?;
                self.set_items(start)?;
            }
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            b'.' => {
                let top = self.pop()?;
                let rest = self.bytes.len() - self.at;
                if rest > 0 || !self.stack.is_empty() || !self.marks.is_empty() {
                    return Err(BinFault::PickleLeft { bytes: rest, values: self.stack.len() });
                }
                return Ok(Some(top));
            }
            code => return Err(BinFault::Opcode { code, at: self.opcode }),
        }
        Ok(None)
    }

    fn take(&mut self, count: usize) -> Result<Span, BinFault> {
        match self.at.checked_add(count).filter(|end| *end <= self.bytes.len()) {
            Some(end) => Ok(Span::new(std::mem::replace(&mut self.at, end), end)),
            None => Err(BinFault::PickleCut { at: self.opcode }),
        }
    }

    /// A whole number of at most eight bytes, little-endian.
    fn number(&mut self, size: usize) -> Result<u64, BinFault> {
        let field = self.take(size)?.of(self.bytes);
        Ok(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn text(&mut self, size: usize) -> Result<Span, BinFault> {
        let span = self.take(size)?;
        match std::str::from_utf8(span.of(self.bytes)) {
            Ok(_) => Ok(span),
            Err(_) => Err(BinFault::NotText { at: self.opcode }),
        }
    }

    pub(super) fn read(&self, span: Span) -> &'p str {
        // Checked when the span was made.
        std::str::from_utf8(span.of(self.bytes)).unwrap_or_default()
    }

    fn underflow(&self) -> BinFault {
        BinFault::Underflow { at: self.opcode }
    }

    pub(super) fn wanted(&self, found: Value, wanted: &'static str) -> BinFault {
        BinFault::Kind { at: self.opcode, found: found.kind(), wanted }
    }

    pub(super) fn push(&mut self, value: Value) -> Result<(), BinFault> {
        if self.stack.len() == MAX_STACK {
            return Err(BinFault::StackSize { limit: MAX_STACK });
        }
        self.stack.push(value);
        Ok(())
    }

    /// The topmost value; those below the last mark belong to what comes after it.
    pub(super) fn pop(&mut self) -> Result<Value, BinFault> {
        match self.stack.pop() {
            Some(value) if self.marks.last().is_none_or(|mark| self.stack.len() >= *mark) => Ok(value),
            _ => Err(self.underflow()),
        }
    }

    pub(super) fn top(&self) -> Result<Value, BinFault> {
        self.stack.last().copied().ok_or_else(|| self.underflow())
    }

    fn mark(&mut self) -> Result<usize, BinFault> {
        self.marks.pop().filter(|start| *start <= self.stack.len()).ok_or_else(|| self.underflow())
    }

    fn int(&mut self, size: usize) -> Result<(), BinFault> {
        let value = self.number(size)? as i64;
        self.push(Value::Int(value))
    }

    pub(super) fn new_dict(&mut self) -> Result<(), BinFault> {
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() as u32 - 1))
    }

    fn tuple(&mut self, start: usize) -> Result<(), BinFault> {
        let place = self.tuples.len();
        self.tuples.extend(self.stack.drain(start..));
        self.push(Value::Tuple(Span::new(place, self.tuples.len())))
    }

    fn global(&mut self) -> Result<(), BinFault> {
        let mut line = || -> Result<&'p str, BinFault> {
            let rest = self.bytes.get(self.at..).unwrap_or_default();
            let size = rest.iter().position(|byte| *byte == b'\n').ok_or(BinFault::PickleCut { at: self.opcode })?;
            let span = self.text(size)?;
            self.at += 1;
            Ok(self.read(span))
        };
        let (module, name) = (line()?, line()?);
        self.push(Value::Global(Global::find(module, name)?))
    }

    /// Places are numbered as they are filled; a writer that skips any is none of PyTorch's.
    fn put(&mut self, size: usize) -> Result<(), BinFault> {
        let (place, value) = (self.number(size)?, self.top()?);
        match usize::try_from(place) {
            Ok(place) if place < self.memo.len() => self.memo[place] = value,
            Ok(place) if place == self.memo.len() => self.memo.push(value),
            _ => return Err(BinFault::Memo { at: self.opcode, found: place, filled: self.memo.len() }),
        }
        Ok(())
    }

    fn get(&mut self, size: usize) -> Result<(), BinFault> {
        let place = self.number(size)?;
        let value = usize::try_from(place).ok().and_then(|place| self.memo.get(place)).copied();
        self.push(value.ok_or(BinFault::Memo { at: self.opcode, found: place, filled: self.memo.len() })?)
    }

    fn set_items(&mut self, start: usize) -> Result<(), BinFault> {
        let items: Vec<Value> = self.stack.drain(start..).collect();
        let Value::Dict(dict) = self.top()? else { return Err(self.wanted(self.top()?, "a dict")) };
        let entries = &mut self.dicts[dict as usize];
        let pairs = items.chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return Err(self.underflow());
        }
        entries.extend(pairs.map(|pair| (pair[0], pair[1])));
        Ok(())
    }
}
