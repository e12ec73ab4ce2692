//! Reading a volume's snapshot as `zfs send` writes it.
//!
//! A snapshot has no device unless its volume shows all of its own, and a device does not tell what is not stored. The
//! stream holds what is stored and nothing else, and needs neither.
//!
//! A stream is records of 312 bytes, some followed by data: `struct dmu_replay_record` of include/sys/zfs_ioctl.h in
//! OpenZFS, in the machine's byte order. A volume's content is object 1. Streams are made here and read at once, with no
//! option that would change their form; whatever is not expected is refused.

use std::io::{self, Read};

const RECORD: usize = 312;
const MAGIC: u64 = 0x2_f5ba_cbac;
/// Features that change what the data of a record is: deduplicated, embedded, compressed, raw, redacted.
const STRANGE: u64 = 1 | 1 << 1 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 22 | 1 << 24 | 1 << 25;
/// Of a volume's blocks, and of what comes with other records.
const DATA_MAX: u64 = 16 << 20;
/// The object that a volume's content is.
const CONTENT: u64 = 1;

const BEGIN: u32 = 0;
const OBJECT: u32 = 1;
const FREE_OBJECTS: u32 = 2;
const WRITE: u32 = 3;
const FREE: u32 = 4;
const END: u32 = 5;

/// Reads a whole stream and calls `write` with each piece of the volume that is stored, and its offset.
///
/// # Errors
/// Reading or `write` failed; or the stream is not what it should be, or ends too early.
pub(super) fn read(
    stream: &mut dyn Read,
    mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut record = [0; RECORD];
    let mut data = Vec::new();
    let mut has_begun = false;
    loop {
        stream.read_exact(&mut record)?;
        let kind = u32_at(&record, 0);
        match kind {
            BEGIN if !has_begun => {
                let features = u64_at(&record, 16) >> 2;
                if u64_at(&record, 8) != MAGIC || features & STRANGE != 0 {
                    return Err(refused("its head is not that of a plain stream"));
                }
                has_begun = true;
                take(stream, u32_at(&record, 4).into(), &mut data)?;
            }
            _ if !has_begun => return Err(refused("it has no head")),
            OBJECT => {
                let length = u64::from(u32_at(&record, 28)).next_multiple_of(8);
                take(stream, length, &mut data)?;
            }
            WRITE => {
                let (object, offset) = (u64_at(&record, 8), u64_at(&record, 24));
                if record[50] != 0 {
                    return Err(refused("its data is compressed"));
                }
                take(stream, u64_at(&record, 32), &mut data)?;
                if object == CONTENT {
                    write(offset, &data)?;
                }
            }
            // A full stream tells of stretches without data, which is what nobody writes anyway.
            FREE_OBJECTS | FREE => {}
            END => {
                // Nothing follows; but whoever writes it must be able to end.
                return match io::copy(stream, &mut io::sink())? {
                    0 => Ok(()),
                    _ => Err(refused("it goes on after its end")),
                };
            }
            other => return Err(refused(&format!("it has a record of kind {other}"))),
        }
    }
}

fn take(stream: &mut dyn Read, length: u64, data: &mut Vec<u8>) -> io::Result<()> {
    if length > DATA_MAX {
        return Err(refused(&format!("it has a record with {length} bytes")));
    }
    data.resize(crate::fs::clamp_usize(length), 0);
    stream.read_exact(data)
}

fn refused(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the stream of the snapshot cannot be read: {why}"),
    )
}

fn u32_at(record: &[u8; RECORD], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&record[at..at + 4]);
    u32::from_ne_bytes(bytes)
}

fn u64_at(record: &[u8; RECORD], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&record[at..at + 8]);
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u32, fields: &[(usize, u64)], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; RECORD];
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        for (at, value) in fields {
            bytes[*at..at + 8].copy_from_slice(&value.to_ne_bytes());
        }
        bytes.extend(data);
        bytes
    }

    fn begin(features: u64) -> Vec<u8> {
        record(BEGIN, &[(8, MAGIC), (16, features << 2 | 1)], b"")
    }

    fn written(object: u64, offset: u64, data: &[u8]) -> Vec<u8> {
        let fields = [(8, object), (24, offset), (32, data.len() as u64)];
        record(WRITE, &fields, data)
    }

    fn pieces(stream: &[Vec<u8>]) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let mut pieces = Vec::new();
        read(&mut stream.concat().as_slice(), |offset, data| {
            pieces.push((offset, data.to_vec()));
            Ok(())
        })?;
        Ok(pieces)
    }

    #[test]
    fn what_is_stored_comes_out_and_nothing_else() {
        let object = |bonus: u32| {
            let mut object = record(
                OBJECT,
                &[(8, 1)],
                &vec![7; bonus.next_multiple_of(8) as usize],
            );
            object[28..32].copy_from_slice(&bonus.to_ne_bytes());
            object
        };
        let stream = [
            begin(1 << 2),
            object(0),
            written(1, 16384, &[1; 16384]),
            record(FREE, &[(8, 1), (16, 32768), (24, 1 << 20)], b""),
            object(13),
            written(2, 0, b"properties"),
            record(FREE_OBJECTS, &[], b""),
            written(1, 65536, &[2; 512]),
            record(END, &[], b""),
        ];
        let expected = [(16384, vec![1; 16384]), (65536, vec![2; 512])];
        assert_eq!(pieces(&stream).unwrap(), expected);
    }

    #[test]
    fn what_is_not_expected_is_refused() {
        let end = || record(END, &[], b"");
        let mut compressed = written(1, 0, b"x");
        compressed[50] = 15;
        let cases = [
            (vec![end()], "no head"),
            (vec![begin(1 << 22), end()], "plain stream"),
            (vec![record(BEGIN, &[(8, 7)], b""), end()], "plain stream"),
            (vec![begin(0), compressed, end()], "compressed"),
            (vec![begin(0), record(8, &[], b""), end()], "kind 8"),
            (
                vec![begin(0), record(WRITE, &[(8, 1), (32, 1 << 40)], b"")],
                "bytes",
            ),
            (vec![begin(0), end(), vec![0]], "after its end"),
            (vec![begin(0), begin(0)], "kind 0"),
        ];
        for (stream, says) in cases {
            let error = pieces(&stream).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{says}");
            assert!(error.to_string().contains(says), "{error}");
        }
        let cut = [begin(0), written(1, 0, &[1; 512])[..400].to_vec()];
        let error = pieces(&cut).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
