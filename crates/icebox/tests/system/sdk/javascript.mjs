// Programs against E2B's own JavaScript SDK, as people write them: every row of what it can ask for that needs no cloud.
//
// Run by ../sdk.rs with the four variables set, in a directory where npm has put the SDK.

import assert from 'node:assert/strict'
import fs from 'node:fs/promises'
import { createRequire } from 'node:module'
import os from 'node:os'
import path from 'node:path'
import { pathToFileURL } from 'node:url'

const require = createRequire(path.join(process.cwd(), 'package.json'))
const sdk = await import(pathToFileURL(require.resolve('e2b').replace(/index\.js$/, 'index.mjs')))
const { Sandbox, Template, NotFoundError, TimeoutError, CommandExitError, AuthenticationError, BuildError } = sdk
const interpreter = require('@e2b/code-interpreter')

const API = process.env.E2B_API_URL
const RUN = process.env.ICEBOX_SDK_RUN
const ODD = { run: RUN, 'odd key & more': 'a=b&c d%20+ü' }

const rows = []
const row = (name, check) => rows.push([name, check])

async function until(what, condition, seconds = 120) {
  const end = Date.now() + seconds * 1000
  for (;;) {
    const found = await condition()
    if (found) return found
    assert(Date.now() < end, `${what}: not within ${seconds} s`)
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
}

async function all(paginator) {
  const found = []
  while (paginator.hasNext) found.push(...(await paginator.nextItems()))
  return found
}

row('a sandbox is there when create returns', async (box) => {
  assert.match(box.sandboxId, /^i[a-z0-9]{20}$/)
  assert.equal(await box.isRunning(), true)
  const info = await box.getInfo()
  assert.deepEqual(info.metadata, ODD)
  assert.equal(info.state, 'running')
  assert.equal(info.envdVersion, '0.6.13')
  const again = await Sandbox.connect(box.sandboxId, { timeoutMs: 60_000 })
  assert.equal((await again.commands.run('echo hi')).stdout, 'hi\n')
  assert.deepEqual((await again.getInfo()).endAt, info.endAt)
})

row('lists are filtered and come in pages', async (box) => {
  const other = await Sandbox.create('base', { timeoutMs: 300_000, metadata: { run: RUN } })
  const query = { metadata: { run: RUN }, state: ['running', 'paused'] }
  const found = await all(Sandbox.list({ query, limit: 1 }))
  assert.deepEqual(found.map((it) => it.sandboxId), [other.sandboxId, box.sandboxId])
  const one = await all(Sandbox.list({ query: { metadata: ODD } }))
  assert.deepEqual(one.map((it) => it.sandboxId), [box.sandboxId])
  assert.equal(await other.kill(), true)
  assert.equal(await Sandbox.kill(other.sandboxId), false)
  await assert.rejects(Sandbox.connect(other.sandboxId), NotFoundError)
})

row('errors have their own classes', async (box) => {
  await assert.rejects(Sandbox.create('nonexistent'), /404/)
  await assert.rejects(Sandbox.create('base', { apiKey: 'e2b_00' }), AuthenticationError)
  await assert.rejects(box.files.read('/not/there'), NotFoundError)
  await assert.rejects(box.commands.run('exit 3'), (error) => error instanceof CommandExitError && error.exitCode === 3)
  await assert.rejects(box.commands.run('sleep 600', { timeoutMs: 2000 }), TimeoutError)
})

row('a paused sandbox goes on where it was', async () => {
  const other = await Sandbox.create('base', { timeoutMs: 300_000, envs: { KEPT: 'kept' } })
  const sleeping = await other.commands.run('sleep 600', { background: true })
  await other.pause()
  assert.equal(await other.isRunning(), false)
  assert.equal((await Sandbox.getInfo(other.sandboxId)).state, 'paused')
  const again = await Sandbox.connect(other.sandboxId, { timeoutMs: 300_000 })
  assert.equal((await again.commands.run('echo $KEPT')).stdout, 'kept\n')
  assert((await again.commands.list()).some((it) => it.pid === sleeping.pid))
  await again.kill()
  await assert.rejects(sleeping.wait())
})

row('time may be set, and what is over pauses and goes on by itself', async (box) => {
  await box.setTimeout(700_000)
  const left = (await box.getInfo()).endAt - Date.now()
  assert(left > 600_000 && left <= 700_000, `${left}`)
  // The others need it, however long they take.
  await box.setTimeout(3_600_000)
  const lifecycle = { onTimeout: 'pause', autoResume: true }
  const other = await Sandbox.create('base', { timeoutMs: 3000, lifecycle })
  const state = async () => (await Sandbox.getInfo(other.sandboxId)).state
  await until('it is paused', async () => (await state()) === 'paused')
  assert.equal((await other.commands.run('echo resumed')).stdout, 'resumed\n')
  assert.equal(await state(), 'running')
  await other.pause({ keepMemory: false })
  const paused = { query: { state: ['paused'] } }
  assert((await all(Sandbox.list(paused))).some((it) => it.sandboxId === other.sandboxId))
  assert.equal(await other.kill(), true)
})

row('metrics are there', async (box) => {
  const samples = await until('a sample', async () => {
    const samples = await box.getMetrics()
    return samples.length && samples
  })
  assert(samples[0].memTotal > 0 && samples[0].cpuCount >= 1, JSON.stringify(samples[0]))
})

row('snapshots and forks begin where their sandbox is', async (box) => {
  await box.files.write('/home/user/before', RUN)
  const snapshot = await box.createSnapshot({ name: `js-${RUN}` })
  const listed = await all(box.listSnapshots({ limit: 1 }))
  assert(listed.some((it) => it.snapshotId === snapshot.snapshotId))
  const [fork] = await box.fork({ timeoutMs: 120_000 })
  const other = await Sandbox.create(snapshot.snapshotId, { timeoutMs: 120_000 })
  for (const one of [fork.sandbox ?? fork, other]) {
    assert.equal(await one.files.read('/home/user/before'), RUN)
    await one.kill()
  }
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
})

row('commands stream, take input and are killed', async (box) => {
  let said = ''
  const done = await box.commands.run('echo out; echo err >&2; whoami; pwd', { onStdout: (data) => { said += data } })
  assert.equal(said, 'out\nuser\n/home/user\n')
  assert.equal(done.stderr, 'err\n')
  const cat = await box.commands.run('cat', { background: true, stdin: true })
  await box.commands.sendStdin(cat.pid, 'fed\n')
  await box.commands.closeStdin(cat.pid)
  assert.equal((await cat.wait()).stdout, 'fed\n')
  const sleeping = await box.commands.run('sleep 600', { background: true })
  assert.equal(await sleeping.kill(), true)
  await assert.rejects(sleeping.wait())
  assert.equal(await box.commands.kill(sleeping.pid), false)
  let shown = ''
  const terminal = await box.pty.create({ cols: 80, rows: 24, onData: (data) => { shown += Buffer.from(data) } })
  await box.pty.sendInput(terminal.pid, new TextEncoder().encode('tput cols 2>/dev/null || stty size; exit\n'))
  await terminal.wait()
  assert.match(shown, /80/)
  const other = await box.pty.create({ cols: 80, rows: 24, onData: (data) => { shown += Buffer.from(data) } })
  await box.pty.resize(other.pid, { cols: 101, rows: 33 })
  await box.pty.sendInput(other.pid, new TextEncoder().encode('stty size\n'))
  await until('the new size', () => shown.includes('33 101'))
  assert.equal(await box.pty.kill(other.pid), true)
  await assert.rejects(other.wait())
  const late = await box.commands.run('read line; echo heard $line', { background: true, stdin: true })
  const again = await box.commands.connect(late.pid)
  await box.commands.sendStdin(late.pid, 'this\n')
  assert.equal((await again.wait()).stdout, 'heard this\n')
  assert.equal((await box.commands.run('whoami; pwd; echo $SET $HERE', { user: 'root', cwd: '/tmp', envs: { HERE: 'here' } })).stdout, 'root\n/tmp\nset here\n')
})

row('files are written, read, listed and watched', async (box) => {
  const raw = new Uint8Array(300_000).map((_, at) => at % 251)
  await box.files.write('deep/raw', raw.buffer)
  assert.deepEqual(await box.files.read('deep/raw', { format: 'bytes' }), raw)
  await box.files.write([{ path: 'deep/a', data: 'a' }, { path: 'deep/b', data: 'b' }])
  const stream = await box.files.read('deep/raw', { format: 'stream' })
  let length = 0
  for await (const piece of stream) length += piece.length
  assert.equal(length, raw.length)
  assert.deepEqual((await box.files.list('deep')).map((it) => it.name).sort(), ['a', 'b', 'raw'])
  assert.equal(await box.files.makeDir('deep/new'), true)
  assert.equal(await box.files.makeDir('deep/new'), false)
  const events = []
  const watch = await box.files.watchDir('deep', (event) => events.push(`${event.type} ${event.name}`), { recursive: true })
  await box.files.write('deep/new/file', 'x')
  await until('the events', () => events.includes('create new/file') && events.includes('write new/file'))
  await watch.stop()
  await box.files.write('deep/labelled', 'x', { metadata: { colour: 'blue' } })
  assert.deepEqual((await box.files.getInfo('deep/labelled')).metadata, { colour: 'blue' })
  await box.files.write('deep/packed', 'packed'.repeat(1000), { gzip: true })
  assert.equal(await box.files.read('deep/packed', { gzip: true }), 'packed'.repeat(1000))
  const piece = new TextEncoder().encode('x'.repeat(100_000))
  const source = new ReadableStream({ start(to) { for (let n = 0; n < 10; n++) to.enqueue(piece); to.close() } })
  await box.files.write('deep/streamed', source)
  assert.equal((await box.files.getInfo('deep/streamed')).size, 1_000_000)
  await box.files.rename('deep/a', 'deep/c')
  assert.equal(await box.files.exists('deep/a'), false)
  await box.files.remove('deep')
  assert.equal(await box.files.exists('deep'), false)
})

row('signed URLs need nothing else', async (box) => {
  await box.files.write('signed', 'signed')
  const url = await box.downloadUrl('signed', { useSignatureExpiration: 60 })
  assert.equal(await (await fetch(url)).text(), 'signed')
  const form = new FormData()
  form.append('file', new Blob(['sent']))
  const sent = await fetch(await box.uploadUrl('uploaded', { user: 'user' }), { method: 'POST', body: form })
  assert.equal(sent.status, 200, await sent.text())
  assert.equal(await box.files.read('uploaded'), 'sent')
  assert.equal((await fetch(`${API}/files?path=signed`)).status, 401)
})

row('ports are reached', async (box) => {
  await box.files.write('served', RUN)
  await box.commands.run('python3 -m http.server 8100 --bind 127.0.0.1 --directory /home/user', { background: true })
  assert(box.getHost(8100).startsWith(`8100-${box.sandboxId}.`))
  const headers = { 'E2b-Sandbox-Id': box.sandboxId, 'E2b-Sandbox-Port': '8100' }
  const fetched = () => fetch(`${API}/served`, { headers })
  await until('the port', async () => (await fetched()).status === 200)
  assert.equal(await (await fetched()).text(), RUN)
})

row('git works in a guest', async (box) => {
  const here = '/home/user/js-project'
  await box.commands.run('git init -q --bare -b main js-origin.git')
  await box.git.configureUser('Somebody', 'somebody@example.org')
  await box.git.init(here, { initialBranch: 'main' })
  await box.files.write(`${here}/file`, 'one\n')
  await box.git.add(here)
  await box.git.commit(here, 'the first')
  assert((await box.git.status(here)).isClean)
  await box.git.remoteAdd(here, 'origin', 'file:///home/user/js-origin.git')
  await box.git.push(here, { remote: 'origin', branch: 'main' })
  await box.git.clone('file:///home/user/js-origin.git', { path: '/home/user/js-copy' })
  assert.equal(await box.files.read('/home/user/js-copy/file'), 'one\n')
  assert.equal((await box.git.branches('/home/user/js-copy')).currentBranch, 'main')
})

row('templates are built by steps', async () => {
  const name = `js-built-${RUN}`
  const context = await fs.mkdtemp(path.join(os.tmpdir(), 'icebox-'))
  await fs.writeFile(path.join(context, 'one.txt'), 'one')
  const options = { cpuCount: 1, memoryMB: 256 }
  try {
    const lines = []
    const template = Template({ fileContextPath: context })
      .fromTemplate('base')
      .copy('one.txt', '/home/user/one.txt')
      .setEnvs({ COLOUR: 'blue' })
      .setWorkdir('/home/user/work')
      .runCmd('echo $COLOUR > made; whoami')
    await Template.build(template, name, { ...options, onBuildLogs: (it) => lines.push(it.message) })
    assert(lines.includes('user'), lines.join())
    const box = await Sandbox.create(name, { timeoutMs: 120_000 })
    assert.equal((await box.commands.run('pwd; cat made ../one.txt')).stdout, '/home/user/work\nblue\none')
    await box.kill()
    assert.equal(await Template.exists(name), true)
    await Template.assignTags(name, ['v1'])
    assert.deepEqual((await Template.getTags(name)).map((it) => it.tag).sort(), ['default', 'v1'])
    await Template.removeTags(name, ['v1'])
    const failing = Template().fromTemplate('base').runCmd('exit 3')
    await assert.rejects(Template.build(failing, name, options), (error) => error instanceof BuildError && /failed to run command 'exit 3'/.test(error.message))
  } finally {
    assert.equal(await Sandbox.deleteSnapshot(name), true)
    await fs.rm(context, { recursive: true })
  }
})

row('code runs in contexts', async () => {
  const box = await interpreter.Sandbox.create('base', { timeoutMs: 120_000 })
  await box.files.write('interpreter.py', await fs.readFile(new URL('interpreter.py', import.meta.url), 'utf8'))
  await box.commands.run('python3 interpreter.py', { background: true })
  const headers = { 'E2b-Sandbox-Id': box.sandboxId, 'E2b-Sandbox-Port': '49999' }
  await until('it listens', async () => (await fetch(`${API}/contexts`, { headers })).status === 200)
  let said = ''
  const done = await box.runCode("x = 20; print('said'); x + 1", { onStdout: (it) => { said += it.line } })
  assert.equal(done.text, '21')
  assert.equal(said, 'said\n')
  assert.equal((await box.runCode('1 / 0')).error.name, 'ZeroDivisionError')
  const context = await box.createCodeContext({ cwd: '/tmp' })
  assert.equal((await box.runCode('import os; os.getcwd()', { context })).text, "'/tmp'")
  await box.kill()
})

row('a killed sandbox cuts its streams', async () => {
  const other = await Sandbox.create('base', { timeoutMs: 300_000 })
  const sleeping = await other.commands.run('sleep 600', { background: true })
  const waiting = assert.rejects(sleeping.wait(), TimeoutError)
  assert.equal(await other.kill(), true)
  await waiting
  assert.equal(await other.isRunning(), false)
})

row('time runs out', async () => {
  const short = await Sandbox.create('base', { timeoutMs: 3000 })
  await until('its time is over', async () => !(await short.isRunning()))
})

const wanted = process.argv.slice(2)
const failed = []
const box = await Sandbox.create('base', { timeoutMs: 900_000, metadata: ODD, envs: { SET: 'set' } })
for (const [name, check] of rows) {
  if (wanted.length && !wanted.some((word) => name.includes(word))) continue
  const begun = Date.now()
  let outcome = 'ok'
  try {
    await check(box)
  } catch (error) {
    console.error(error)
    failed.push(name)
    outcome = 'FAILED'
  }
  console.log(`  ${name}: ${outcome}, ${((Date.now() - begun) / 1000).toFixed(1)} s`)
}
for (const left of await all(Sandbox.list())) await Sandbox.kill(left.sandboxId)
if (failed.length) {
  console.error(`${failed.length} rows failed: ${failed.join(', ')}`)
}
process.exit(failed.length ? 1 : 0)
