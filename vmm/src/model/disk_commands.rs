//! The commands that use the disks themselves.
//!
//! | command | does |
//! |---|---|
//! | `FT.DISK WRITE block value` | fills a block of 4096 bytes with the value, again and again |
//! | `FT.DISK READ block` | the block's 4096 bytes |
//! | `FT.DISK ZERO block [count]` | makes blocks zeroes |
//! | `FT.DISK SUM [disk]` | XXH3-64 of all of a disk (0 if not said), 16 hexadecimal digits |
//! | `FT.DISK INFO` | for each disk: bytes, `rw` or `ro`; the log's records and bytes |
//! | `FT.FSYNC` | answers when everything so far is on stable storage |
//!
//! Blocks are counted where the log is not: on disk 1 if there is one, otherwise on disk 0, behind the log's half if there is a log.
//! What a disk does not do is answered with `-EIO disk`.

use xxhash_rust::xxh3::Xxh3;

use super::commands::{Call, Done, Failure, SYNTAX};
use super::disks::DiskFailure;
use super::log;
use crate::disk::ByteRange;

const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = 4096;
/// A digest reads so much at a time.
const PIECE: usize = 256 << 10;

const NO_BLOCK: Failure = Failure::Text("ERR the disk has no such block");
const NO_DISK: Failure = Failure::Text("ERR there is no such disk");

/// Where the blocks are: disk, first byte, number of blocks.
fn area(call: &Call<'_, '_>) -> Result<(u8, u64, u64), Failure> {
    let disk = u8::from(call.disks.len() > 1);
    let bytes = call.disks.get(disk).ok_or(NO_DISK)?.bytes();
    let start = match (disk, call.registers.log.on) {
        (0, true) => log::capacity(call.disks).unwrap_or(0).next_multiple_of(BLOCK),
        _ => 0,
    };
    Ok((disk, start, bytes.saturating_sub(start) / BLOCK))
}

/// The place of `count` blocks from that of argument `index` on.
fn place(call: &Call<'_, '_>, index: usize, count: u64) -> Result<(u8, ByteRange), Failure> {
    let (disk, start, blocks) = area(call)?;
    let block = u64::try_from(call.integer(index)?).map_err(|_| NO_BLOCK)?;
    if count == 0 || block.checked_add(count).is_none_or(|end| end > blocks) {
        return Err(NO_BLOCK);
    }
    Ok((disk, ByteRange { offset: start + block * BLOCK, len: count * BLOCK }))
}

pub(super) fn disk(call: &mut Call<'_, '_>) -> Done {
    match call.arguments.len() {
        4 if call.is(1, "WRITE") => write(call),
        3 if call.is(1, "READ") => read(call),
        3 | 4 if call.is(1, "ZERO") => zero(call),
        2 | 3 if call.is(1, "SUM") => sum(call),
        2 if call.is(1, "INFO") => info(call),
        _ => Err(SYNTAX),
    }
}

fn write(call: &mut Call<'_, '_>) -> Done {
    let (disk, range) = place(call, 2, 1)?;
    let value = call.argument(3);
    if value.is_empty() || value.len() > BLOCK_BYTES {
        return Err(Failure::Text("ERR a block is filled from 1 to 4096 bytes"));
    }
    let block: Vec<u8> = value.iter().copied().cycle().take(BLOCK_BYTES).collect();
    call.disks.write(disk, range.offset, &block)?;
    call.ok()
}

fn read(call: &mut Call<'_, '_>) -> Done {
    let (disk, range) = place(call, 2, 1)?;
    let mut block = [0; BLOCK_BYTES];
    call.disks.read(disk, range.offset, &mut block)?;
    call.reply.bulk(&block);
    Ok(())
}

fn zero(call: &mut Call<'_, '_>) -> Done {
    let count = match call.arguments.len() {
        4 => u64::try_from(call.integer(3)?).map_err(|_| NO_BLOCK)?,
        _ => 1,
    };
    let (disk, range) = place(call, 2, count)?;
    call.disks.zero(disk, range)?;
    call.ok()
}

fn sum(call: &mut Call<'_, '_>) -> Done {
    let disk = match call.arguments.len() {
        3 => u8::try_from(call.integer(2)?).map_err(|_| NO_DISK)?,
        _ => 0,
    };
    let bytes = call.disks.get(disk).ok_or(NO_DISK)?.bytes();
    let (mut hash, mut piece, mut at) = (Xxh3::new(), vec![0; PIECE], 0);
    while at < bytes {
        let length = usize::try_from(bytes - at).unwrap_or(PIECE).min(PIECE);
        let (piece, _) = piece.split_at_mut(length);
        call.disks.read(disk, at, piece)?;
        hash.update(piece);
        at += length as u64;
    }
    call.reply.bulk(format!("{:016x}", hash.digest()).as_bytes());
    Ok(())
}

fn info(call: &mut Call<'_, '_>) -> Done {
    let mut text = String::new();
    for number in 0u8.. {
        let Some(disk) = call.disks.get(number) else { break };
        let mode = if disk.is_read_only() { "ro" } else { "rw" };
        text.push_str(&format!("disk{number}:{},{mode}\r\n", disk.bytes()));
    }
    let log = &call.registers.log;
    text.push_str(&format!("log_records:{}\r\nlog_bytes:{}\r\n", log.records, log.tail));
    call.reply.bulk(text.as_bytes());
    Ok(())
}

pub(super) fn fsync(call: &mut Call<'_, '_>) -> Done {
    call.disks.flush()?;
    call.ok()
}

impl From<DiskFailure> for Failure {
    fn from(failure: DiskFailure) -> Self {
        match failure {
            DiskFailure::Wait => Self::Wait,
            DiskFailure::Io => Self::Text("EIO disk"),
        }
    }
}
