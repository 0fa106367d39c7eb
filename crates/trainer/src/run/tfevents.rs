//! TensorBoard's event files, as far as scalars need them.
//!
//! A file is a sequence of records (`tensorflow/core/lib/io/record_writer.h`): length in 8 bytes, masked CRC-32C of these,
//! content, masked CRC-32C of it, all little-endian. A content is an `Event` message (`tensorflow/core/util/event.proto`):
//! `wall_time = 1` (double), `step = 2`, `file_version = 3` (string) or `summary = 5`, which repeats `value = 1` of
//! `tag = 1` (string) and `simple_value = 2` (float).

use std::io::{self, Write};

/// Wire types of protocol buffers.
const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const BYTES: u64 = 2;
const FIXED_32: u64 = 5;

/// Writes the record that every event file begins with.
pub(crate) fn begin(out: &mut dyn Write, wall_time: f64) -> io::Result<()> {
    let mut event = event(wall_time, 0);
    field(&mut event, 3, b"brain.Event:2");
    record(out, &event)
}

/// Writes the scalars of one step.
pub(crate) fn scalars(
    out: &mut dyn Write,
    wall_time: f64,
    step: u64,
    values: &[(&str, f64)],
) -> io::Result<()> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut message = Vec::new();
        field(&mut message, 1, tag.as_bytes());
        key(&mut message, 2, FIXED_32);
        message.extend((*value as f32).to_le_bytes());
        field(&mut summary, 1, &message);
    }
    let mut event = event(wall_time, step);
    field(&mut event, 5, &summary);
    record(out, &event)
}

fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    key(&mut event, 1, FIXED_64);
    event.extend(wall_time.to_le_bytes());
    if step != 0 {
        key(&mut event, 2, VARINT);
        varint(&mut event, step);
    }
    event
}

fn field(message: &mut Vec<u8>, number: u64, content: &[u8]) {
    key(message, number, BYTES);
    varint(message, content.len() as u64);
    message.extend(content);
}

fn key(message: &mut Vec<u8>, number: u64, wire_type: u64) {
    varint(message, number << 3 | wire_type);
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn record(out: &mut dyn Write, content: &[u8]) -> io::Result<()> {
    let length = (content.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(content.len() + 16);
    bytes.extend(length);
    bytes.extend(masked_crc(&length).to_le_bytes());
    bytes.extend(content);
    bytes.extend(masked_crc(content).to_le_bytes());
    out.write_all(&bytes)
}

/// A CRC of data that holds CRCs is weak, so TensorFlow turns and moves it.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by TensorBoard 2.21 (`Event`, `RecordWriter`) for the same times, steps and values.
    const REFERENCE: &str = include_str!("tfevents_reference.hex");

    #[test]
    fn the_bytes_are_those_that_tensorboard_writes() {
        let mut bytes = Vec::new();
        begin(&mut bytes, 1_700_000_000.5).expect("memory");
        let values = [("loss", 0.25), ("validation/loss", 1e-4)];
        scalars(&mut bytes, 1_700_000_001.25, 1, &values).expect("memory");
        scalars(&mut bytes, 1_700_000_002.0, 300, &[("lr", 0.0)]).expect("memory");
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let reference: String = REFERENCE.split_whitespace().collect();
        assert_eq!(hex, reference);
    }
}
