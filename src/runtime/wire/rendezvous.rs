//! How processes find each other, and the messages between them.
use super::RuntimeError;
use crate::launch::World;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Kinds of messages. Who joins says `HELLO`, and rank 0 `WELCOME` or why not.
const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REFUSED: u8 = 3;
pub(super) const ALIVE: u8 = 4;
pub(super) const DATA: u8 = 5;
/// A rank goes no further; its number and why.
pub(super) const GONE: u8 = 6;
/// It has done all it had to.
pub(super) const DONE: u8 = 7;

/// Says that the other side is trtvlm too, with the same messages.
const MAGIC: &[u8; 8] = b"trtvlm-1";

/// Bytes of a message at most: more is no message of ours.
const LARGEST: u64 = 1 << 34;

fn refused(reason: impl Into<String>) -> RuntimeError {
    RuntimeError::Ranks(reason.into())
}

pub(super) fn send(stream: &mut TcpStream, kind: u8, bytes: &[u8]) -> std::io::Result<()> {
    let mut head = [kind; 9];
    head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    stream.write_all(&head)?;
    stream.write_all(bytes)
}

pub(super) fn receive(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let length = u64::from_le_bytes(length);
    if length > LARGEST {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    // What is not there takes no memory.
    let found = stream.take(length).read_to_end(&mut bytes)?;
    if (found as u64) < length { Err(ErrorKind::UnexpectedEof.into()) } else { Ok((kind, bytes)) }
}

pub(super) fn prepare(stream: &TcpStream, patience: Duration) -> std::io::Result<()> {
    // An accepted connection may have taken over that its listener does not wait.
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

/// Rank 0 waits for all others.
pub(super) fn gather(world: &World, same: &[u8], limit: Duration) -> Result<Vec<(usize, TcpStream)>, RuntimeError> {
    let end = Instant::now() + limit;
    let port = world.address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    let port = port.ok_or_else(|| refused(format!("`{}` is no HOST:PORT", world.address)))?;
    // A name for this machine itself needs no door to others.
    let local = world.address.starts_with("127.") || world.address.starts_with("localhost:");
    let listener = TcpListener::bind((if local { "127.0.0.1" } else { "0.0.0.0" }, port));
    let failed = |error: std::io::Error| refused(format!("rank 0 cannot listen at port {port}: {error}"));
    let listener = listener.map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let mut found: Vec<Option<TcpStream>> = (1..world.size).map(|_| None).collect();
    while found.iter().any(Option::is_none) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let absent: Vec<String> =
                    (1..world.size).filter(|rank| found[rank - 1].is_none()).map(|rank| rank.to_string()).collect();
                let (s, absent) = (if absent.len() > 1 { "s" } else { "" }, absent.join(", "));
                return Err(refused(format!("rank{s} {absent} did not come to {} within {limit:?}", world.address)));
            }
            Err(error) => return Err(failed(error)),
        };
        // Whatever else connects is no rank and does not matter, also if it says nothing.
        if let Some((rank, stream)) = greet(stream, world, same, &found)? {
            found[rank - 1] = Some(stream);
        }
    }
    let mut peers = Vec::new();
    for (place, stream) in found.into_iter().enumerate() {
        let Some(mut stream) = stream else { continue };
        let told = send(&mut stream, WELCOME, &[]);
        told.map_err(|error| refused(format!("rank {} has stopped: {error}", place + 1)))?;
        peers.push((place + 1, stream));
    }
    Ok(peers)
}

/// How long a connection has to say who it is.
const MANNERS: Duration = Duration::from_secs(2);

/// The rank that a connection is, if it is one.
fn greet(
    mut stream: TcpStream,
    world: &World,
    same: &[u8],
    found: &[Option<TcpStream>],
) -> Result<Option<(usize, TcpStream)>, RuntimeError> {
    let Ok((HELLO, hello)) = prepare(&stream, MANNERS).and_then(|()| receive(&mut stream)) else { return Ok(None) };
    let Some((rank, size, theirs)) = read_hello(&hello) else { return Ok(None) };
    let known = rank.checked_sub(1).and_then(|place| found.get(place));
    let fault = match known {
        _ if size != world.size => format!("rank {rank} counts {size} ranks, rank 0 {}", world.size),
        None => format!("there is no rank {rank} of {size}"),
        Some(Some(_)) => format!("rank {rank} came twice"),
        Some(None) if theirs != same => format!("rank {rank} runs another directory than rank 0"),
        Some(None) => return Ok(Some((rank, stream))),
    };
    let _ = send(&mut stream, REFUSED, fault.as_bytes());
    Err(refused(fault))
}

fn hello(world: &World, same: &[u8]) -> Vec<u8> {
    [MAGIC, &(world.rank as u64).to_le_bytes()[..], &(world.size as u64).to_le_bytes(), same].concat()
}

fn read_hello(hello: &[u8]) -> Option<(usize, usize, &[u8])> {
    let (rank, rest) = hello.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    let (size, same) = rest.split_first_chunk::<8>()?;
    let number = |bytes: &[u8; 8]| usize::try_from(u64::from_le_bytes(*bytes)).ok();
    Some((number(rank)?, number(size)?, same))
}

/// Another rank calls rank 0 until it answers.
pub(super) fn call(world: &World, same: &[u8], limit: Duration) -> Result<(usize, TcpStream), RuntimeError> {
    let end = Instant::now() + limit;
    let mut last = "it has no address".to_owned();
    while Instant::now() < end {
        let addresses = world.address.to_socket_addrs().map_err(|error| last = error.to_string());
        for address in addresses.into_iter().flatten() {
            match TcpStream::connect_timeout(&address, end.saturating_duration_since(Instant::now()).max(MANNERS)) {
                Ok(mut stream) => {
                    let asked = prepare(&stream, limit).and_then(|()| send(&mut stream, HELLO, &hello(world, same)));
                    match asked.and_then(|()| receive(&mut stream)) {
                        Ok((WELCOME, _)) => return Ok((0, stream)),
                        Ok((REFUSED, reason)) => return Err(refused(String::from_utf8_lossy(&reason))),
                        Ok(_) => last = format!("`{address}` is no rank of trtvlm"),
                        Err(error) => last = error.to_string(),
                    }
                }
                Err(error) => last = error.to_string(),
            }
        }
        std::thread::sleep(Duration::from_millis(30));
    }
    Err(refused(format!("rank 0 did not answer at {} within {limit:?}: {last}", world.address)))
}
