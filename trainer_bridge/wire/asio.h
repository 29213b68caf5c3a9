// The one way into Boost.Asio. Boost 1.74's coroutine headers use std::exchange without <utility>,
// which GCC's C++20 library no longer brings in by accident, so it comes first.
#pragma once

#include <utility>

#ifndef BOOST_ASIO_NO_DEPRECATED
#define BOOST_ASIO_NO_DEPRECATED
#endif
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>

namespace rollpack::bridge {

namespace asio = boost::asio;
using SystemError = boost::system::error_code;

}  // namespace rollpack::bridge
