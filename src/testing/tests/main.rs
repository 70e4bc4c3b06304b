//! The daemon driven by the fake guest: everything between a vhost-user socket and the bytes of an image.

mod peer;
