// One number decides what is seen: the stop. Whatever carries data-stop shows at its own stop only,
// the curves' cursors too, so that slider and cursor are one thing.
const slider = document.querySelector('#stop')
if (slider) {
  const play = document.querySelector('#play')
  const parts = new Map()                    // stop -> the elements that belong to it
  for (const element of document.querySelectorAll('[data-stop]')) {
    const stop = Number(element.dataset.stop)
    if (!parts.has(stop)) parts.set(stop, [])
    parts.get(stop).push(element)
  }
  let shown = -1
  let timer = 0

  function show(stop) {
    stop = Math.max(0, Math.min(Number(slider.max), stop))
    if (stop === shown) return
    for (const element of parts.get(shown) || []) element.classList.remove('now')
    for (const element of parts.get(stop) || []) element.classList.add('now')
    shown = stop
    slider.value = stop
    const label = document.querySelector('#where .now')
    slider.setAttribute('aria-valuetext', label.textContent)
    for (const button of document.querySelectorAll('#stages button')) {
      const inside = Number(button.dataset.first) <= stop && stop <= Number(button.dataset.final)
      button.setAttribute('aria-current', inside)
    }
  }

  function pause() {
    clearInterval(timer)
    timer = 0
    play.textContent = 'Play'
  }

  function advance() {
    show(shown + 1)
    if (shown === Number(slider.max)) pause()
  }

  play.addEventListener('click', () => {
    if (timer) return pause()
    if (shown === Number(slider.max)) show(0)
    timer = setInterval(advance, 700)
    play.textContent = 'Pause'
  })

  slider.addEventListener('input', () => {
    pause()
    show(Number(slider.value))
  })

  for (const button of document.querySelectorAll('#stages button')) {
    button.addEventListener('click', () => {
      pause()
      show(Number(button.dataset.first))
    })
  }

  document.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key]
    const modified = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey
    const scrolls = event.target.closest && event.target.closest('.wide')
    if (!step || modified || scrolls) return
    event.preventDefault()
    pause()
    show(shown + step)
  })

  for (const drawing of document.querySelectorAll('svg[data-places]')) {
    const places = drawing.dataset.places.split(' ').map(Number)
    const follow = event => {
      const box = drawing.getBoundingClientRect()
      const x = (event.clientX - box.left) / box.width * drawing.viewBox.baseVal.width
      const far = places.map(place => Math.abs(place - x))
      pause()
      show(far.indexOf(Math.min(...far)))
    }
    drawing.addEventListener('pointerdown', follow)
    drawing.addEventListener('pointermove', event => { if (event.buttons) follow(event) })
  }

  show(Number(slider.max))
}
